"""By which words an edit is told to be simple or complex: the table that imagend.router goes by. Pure data.

A pattern is words in a row, small letters without accents: `a|b` is either, `*` is up to six words. The first rule
that matches decides. Words of what is to stay as it is are taken out before (KEPT).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from imagend.control import ControlType
from imagend.edit_words import COLOUR, GOING, LIMB, MATERIAL, MOVED, PLACE, REPLACE, STANCE, WHERE, WHO, WORN

Path = Literal["simple", "complex"]


class Rule(NamedTuple):
    path: Path
    reason: str
    confidence: float
    """from 0 to 1"""
    patterns: tuple[str, ...]
    guides: tuple[ControlType, ...] = (ControlType.POSE, ControlType.DEPTH)
    """of a complex one: what of the original stays, and so may guide what is painted"""


KEPT = (
    "keep|keeping|leave|leaving|dont|doesnt|shouldnt|never|without|same|unchanged|preserve|"
    "garde|gardez|garder|sans|ne|meme|behalte|behalten|ohne|nicht|lasse",
    "do|does|should|must|is|are|to not",
)
"""From such words on to the end of their clause nothing is asked for."""

RULES: tuple[Rule, ...] = (
    Rule(
        "simple",
        "it changes a colour",
        0.9,
        (
            f"{REPLACE} the {COLOUR}|colour|color|hue|shade of|in",
            f"{COLOUR} instead|statt|anstatt|rather|not|plutot",
            f"become|becomes {COLOUR}",
            f"become|becomes a|more|copper|dark|light|deep|bright|pale|soft|warm|cool {COLOUR}",
        ),
    ),
    Rule(
        "simple",
        "it changes what something is made of",
        0.9,
        (
            "texture|textured|finish|pattern|patterned|polka|stripes|striped|plaid|floral|checkered|embroidery|"
            "embroidered|"
            "leopard|camouflage|grain|sequins|struktur|muster|gestreift|motif|motifs|rayures",
        ),
    ),
    Rule(
        "simple",
        "it changes the background",
        0.95,
        (
            f"{REPLACE}|set|blur|use|make|brighten|darken|extend * {PLACE}",
            f"swap out * {PLACE}",
            f"{PLACE} should|soll|to|into|durch|en|par",
            f"mets|mach|andere|ersetze * {PLACE}",
            f"in|as|of|other|new|different * {PLACE}",
            "behind her|him|them|it|me|the",
            "derriere elle|lui|eux|le|la",
            "hinter ihr|ihm|ihnen|dem|der",
            "taken|set in|at",
            "put|place|move|set|transport|teleport|mets|stell|setz * in|on|at|to|into|front|onto|dans|sur|auf|"
            f"vor * {WHERE}",
            "day|night into|to night|day",
        ),
    ),
    Rule(
        "simple",
        "it removes something",
        0.9,
        (
            "remove|removes|erase|delete",
            "get rid of",
            "repair|restore|retouch|fix|fill|clean|cover|hide * scratch|scratches|crease|creases|stain|stains|"
            "dust|blemish|"
            "blemishes|wrinkle|wrinkles|pimple|pimples|spot|spots|tear|tears|crack|cracks|hole|holes|acne|glare|"
            "watermark",
            "no more",
            "take|wipe|cut|get|drop|clean * off|out|away",
            "make|fais|lass|lasse * disappear|vanish|invisible|disparaitre|verschwinden",
            "enleve|enlever|supprime|supprimer|efface|effacer|retire|retirer",
            "entferne|entfernen|losche|loschen",
            "nimm * ab|weg",
            "soll|sollen weg",
            "should be no|fewer",
        ),
    ),
    Rule(
        "complex",
        "it dresses somebody",
        0.9,
        (
            "wear|wears|wearing|worn|porter|tragen|tragt|anziehen",
            "il|elle porte",
            "try|trying|try-on|tryon|essaie|essayer|probiere|anprobe on|le|la|les|den|die|das|the|this|these|of",
            f"put|place|have|setz|zieh * {WHO} * {WORN}",
            f"put|place * {WORN} * on",
            "mets lui|leur",
            "mets-lui|mets-leur|habille|habille-la|habille-le|habille-moi",
            "fais-lui|fais-leur porter",
            "zieh|ziehe|zieht ihr|ihm|ihnen|mir|uns|der|dem|den",
            "dress|clothe * up|as",
            "dressed|clothed in|as|like|up",
            f"{WHO} in a|an|the|this|that|these|some * {WORN}",
            "setz * auf",
            f"dress|clothe {WHO}|the",
            f"replace|swap|switch|exchange|change|remplace|change|ersetze|tausche|wechsle * {WORN} * to|for|"
            "with|into|by|pour|"
            "contre|par|zu|gegen|durch",
            f"give {WHO} a|an|some|the|this|these * {WORN}",
            "outfit change|swap",
            "different|another|new|other|better|elegant|formal|casual|fancy * outfit|clothes|clothing|costume|"
            "attire|tenue",
            f"put|give|add|get|throw|place|use|try|need|needs|want|wants * {WORN}",
            f"swap|switch|trade {WHO}|his|her|their|my|the * outfits|clothes|{WORN}",
            "on me|him|her|them * as|like|instead",
            "fit|fits|look * on me|him|her|them",
        ),
        (ControlType.POSE,),  # the depth would be that of the clothes that were there
    ),
    Rule(
        "complex",
        "it changes a pose",
        0.9,
        (
            "pose|posture|stance|haltung|position to|change|andere|into|in",
            "change|another|different|new|fighting|running|in|andere * pose|posture|stance|haltung",
            f"let|make|have|should|shall|must|want|fais|fais-le|fais-la|lass|soll|devrait|doit * {STANCE}",
            f"turn|raise|lift|lower|bend|cross|tilt|rotate|move|stretch|put|tourne|leve|dreh|hebe * {LIMB}",
            "look up|down|left|right|away|at",
            "rotate|turn the figure|man|woman|person|character|body",
            f"{STANCE} down|up|to|with|at|against|on",
            f"{LIMB} * {MOVED}",
            f"but|now|more|be|being|soit|etre|rather|actually {GOING}|assis|assise|debout|couche|couchee|"
            "allonge|accroupi",
            "straighten|slouch|hunch * me|him|her|up|them",
            "mid-jump|midair|mid-air|tiptoe|tiptoes|t-pose|hunched|slouching|thumbs|handshake|high-five",
            "de profil|dos|face",
            "facing|face|faces|looking|looks|gazing|glancing left|right|up|down|away|forward|backwards|the|us|"
            "over|back|at|into",
            "seen from|de",
            "on one|both|his|her|their|all|bended knee|knees|fours|side|toes|back|belly|feet",
            f"{LIMB} * crossed|open|wide|apart|together|around|above|behind|overhead|akimbo|out|on|over|under|against",
            "fais-le|fais-la|fais-les",
            "leve|lever|baisse|baisser|penche|pencher|croise|croiser|plie|plier|tends|tendre|assieds|agenouille|"
            "regarde|regarder",
            "heb|hebe|heben|beug|beuge|neig|neige|neigen|streck|strecke|kreuz|kreuze|winkle|setz|leg|stell|dreh|"
            "drehe * hin|um|"
            "kopf|arm|arme|bein|beine|hand|hande|korper|knie|oberkorper|ihn|sie",
            "blick|blickt|schau|schaut|schauen * nach|in|zur|zum|auf",
            "sitzt|steht|liegt|kniet|springt|lauft|hockt|rennt|tanzt|winkt|hinsetzen|aufstehen|hinlegen|"
            "hinknien|umdrehen",
            "assoit|agenouille|saute|court|danse|couche",
            "lass|lasst|lasse * laufen|gehen|rennen|tanzen|lachen|greifen|gebeugt|schauen",
        ),
        (),
    ),
    Rule(
        "simple",
        "it changes a colour",
        0.9,
        (
            "colour|color|colours|colors|hue|shade|tint|recolor|recolour|paint|dye|desaturate|lipstick|couleur|"
            "peins|farbe|streiche",
            f"{REPLACE} * black and white",
            f"to|into|be|in|en {COLOUR}",
            f"mach|mache|rends|farbe * {COLOUR}",
        ),
    ),
    Rule(
        "simple",
        "it changes what something is made of",
        0.9,
        (
            "surface|material",
            f"{REPLACE}|into|in|of|like|comme|wie * {MATERIAL}",
            "look|looks like|wie|as",
        ),
    ),
    Rule(
        "complex",
        "it goes by a picture",
        0.85,
        (
            "reference|referenced|attached|referenz",
            "second|other|first|next picture|image|photo",
            "picture|image|photo 1|2|3|4",
            "with|by|for|like|use|put this|these|that one|product|object|person|item",
        ),
        (ControlType.DEPTH,),
    ),
    Rule(
        "complex",
        "it replaces one thing by another",
        0.85,
        (
            f"{REPLACE} * with|by|for|into|contre|par|en|durch|gegen",
            "verwandle|mach|andere * in|zu",
            "change|switch * to a|an|ein|eine|un|une",
            "where * is|are|was|stands|hangs * want|put|place|should|need",
            "should|must|could|would be * a|an|another|not",
            "be|is|are|want|need * not|instead|rather",
            "instead",
            "place of",
            "rather have|see|than",
            "in its|their|his|her|that place|stead|spot",
            "make|turn it|this|that|them into",
            "become|becomes|trade|traded|upgrade|upgraded * a|an|for|to",
            "become|becomes",
            "put|place|want|add * where * is|was|are|stands|sits|hangs|used",
            "not a|an * but",
            "stattdessen|lieber|austauschen|ersetz|tausch|plutot|remplacez|remplacer",
            "mach|mache aus",
            "soll|sollte|doit|devrait * ein|eine|un|une|etre|sein",
            "a la place de",
            "anstelle|statt",
            "an die stelle",
            "make the|that|those|his|her|my|their * a|an",
            "replace|replaced|swap|swapped|exchange|substitute|remplace|remplacez|ersetze|tausche|echange",
            "be|as|als a|an|ein|eine",
        ),
        (ControlType.DEPTH,),
    ),
    Rule(
        "complex",
        "it changes a pose",
        0.7,
        (f"{WHO} {GOING}", "like|as|if|though|about|starts * jump|run|fall|dance"),
        (),
    ),
    Rule("simple", "it changes a colour", 0.8, (COLOUR, "brighter|darker|lighter|heller|dunkler|eclaircis")),
    Rule("simple", "it changes what something is made of", 0.7, (MATERIAL,)),
    Rule("simple", "it changes the background", 0.7, (PLACE, "snow|rain|fog|sunset|night|neige|schneien|regnen")),
    Rule("complex", "it changes a pose", 0.6, (LIMB,), ()),
    Rule(
        "complex",
        "it dresses somebody",
        0.6,
        (
            WORN,
            f"with|in a|an|the|his|her|this|that|these|my|some * {WORN}",
        ),
        (),
    ),
)
