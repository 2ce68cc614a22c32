"""By which words an edit is told to be simple or complex: the table that imagend.router goes by. Pure data.

A pattern is words in a row, small letters without accents: `a|b` is either, `*` is up to four words. The first rule
that matches decides. Words of what is to stay as it is are taken out before (KEPT).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from imagend.control import ControlType

Path = Literal["simple", "complex"]


class Rule(NamedTuple):
    path: Path
    reason: str
    confidence: float
    """from 0 to 1"""
    patterns: tuple[str, ...]
    guides: tuple[ControlType, ...] = (ControlType.POSE, ControlType.DEPTH)
    """of a complex one: what of the original stays, and so may guide what is painted"""


_COLOUR = (
    "red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|grey|gray|cyan|teal|magenta|beige|navy|golden|"
    "silver|turquoise|burgundy|blonde|blond|ginger|"
    "rouge|jaune|vert|verte|bleu|bleue|violette|rose|marron|noir|noire|blanc|blanche|gris|grise|roux|rousse|dore|"
    "rot|gelb|grun|blau|lila|rosa|braun|schwarz|weiss|grau|golden"
)
_MATERIAL = (
    "glass|marble|wood|wooden|stone|metal|metallic|copper|bronze|iron|steel|rust|rusty|brick|bricks|velvet|silk|leather|"
    "wool|knitted|knit|parquet|paper|plastic|moss|mossy|mud|muddy|wet|snowy|frosted|crumpled|scales|fur|"
    "verre|marbre|bois|pierre|briques|soie|velours|cuir|rouille|"
    "glas|marmor|holz|stein|ziegelstruktur|verrostet|samt|seide"
)
_PLACE = (
    "background|backdrop|sky|scene|scenery|setting|weather|season|landscape|horizon|"
    "fond|arriere-plan|ciel|paysage|decor|meteo|saison|hintergrund|himmel|landschaft|wetter|jahreszeit"
)
_WORN = (
    "clothes|clothing|outfit|outfits|dress|gown|shirt|tshirt|t-shirt|blouse|sweater|pullover|hoodie|jacket|coat|suit|"
    "skirt|jeans|trousers|pants|shorts|shoes|sneakers|boots|hat|cap|scarf|gloves|uniform|kimono|costume|armor|armour|"
    "sunglasses|glasses|necklace|crown|"
    "vetements|robe|chemise|veste|manteau|pantalon|jupe|chapeau|chaussures|tenue|pull|"
    "kleidung|kleid|hemd|jacke|mantel|anzug|hose|rock|hut|schuhe|mutze"
)
_WHO = (
    "him|her|them|me|man|woman|boy|girl|person|model|mannequin|figure|lady|guy|child|king|queen|knight|statue|head|"
    "feet|lui|elle|femme|homme|ihm|ihr|ihn|mann|frau|puppe"
)
_REPLACE = "replace|replaced|swap|swapped|exchange|exchanged|substitute|substituted|change|turn|transform"
_REPLACE += "|remplace|remplacer|echange|transforme|ersetze|ersetzen|tausche|tauschen|verwandle"
_LIMB = "arm|arms|leg|legs|hand|hands|head|knee|knees|finger|fingers|foot|shoulder|shoulders|body|torso|gaze"
_LIMB += "|bras|jambe|jambes|tete|main|mains|genou|corps|kopf|beine|bein|hand|hande|knie|finger"
_STANCE = (
    "sit|stand|lie|kneel|crouch|jump|run|walk|dance|wave|bow|lean|bend|point|raise|lift|hold|cross|rear|squat|fly|"
    "smile|climb|assise|assis|debout|allonge|lever|sitzen|stehen|liegen|knien|springen|winken|laufen|heben|schauen"
)

KEPT = (
    "keep|keeping|leave|dont|not|never|without|same|unchanged|preserve|"
    "garde|garder|sans|ne|meme|behalte|ohne|nicht|lasse"
)
"""From such a word on to the end of its clause nothing is asked for."""

RULES: tuple[Rule, ...] = (
    Rule("simple", "it changes a colour", 0.9, (f"{_REPLACE} the {_COLOUR}|colour|color|hue|shade of|in",)),
    Rule(
        "simple",
        "it changes the background",
        0.95,
        (
            f"{_REPLACE}|swap out|set|blur|use|make|brighten|darken * {_PLACE}",
            f"{_PLACE} should|soll|to|into|durch|en|par",
            f"mets|mach|andere|ersetze * {_PLACE}",
            f"in|as|of|other|new|different * {_PLACE}",
            "behind her|him|them|it|me|the",
            "derriere elle|lui|eux|le|la",
            "hinter ihr|ihm|ihnen|dem|der",
            "taken|set in|at",
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
            "take|wipe|cut|get|drop|clean * off|out|away",
            "make * disappear|vanish|invisible",
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
            f"put|place|have|setz|zieh * {_WHO} * {_WORN}",
            f"put|place * {_WORN} * on",
            "mets lui|leur",
            "mets-lui|mets-leur|habille|habille-la|habille-le",
            "zieh * an|aus",
            "setz * auf",
            f"dress|clothe {_WHO}|the",
            f"{_REPLACE}|wechsle|swap|give|change * {_WORN} * to|for|with|into|by|pour|contre|par|zu|gegen|durch",
            "outfit change",
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
            f"let|make|have|should|shall|must|want|fais|fais-le|fais-la|lass|soll|devrait|doit * {_STANCE}",
            f"turn|raise|lift|lower|bend|cross|tilt|rotate|move|stretch|put|tourne|leve|dreh|hebe * {_LIMB}",
            "look up|down|left|right|away|at",
            "rotate|turn the figure|man|woman|person|character|body",
            f"{_STANCE} down|up|to|with|at|against|on",
        ),
        (),
    ),
    Rule(
        "simple",
        "it changes a colour",
        0.9,
        (
            "colour|color|colours|colors|hue|shade|tint|recolor|recolour|paint|dye|desaturate|lipstick|couleur|peins|farbe|streiche",
            f"{_REPLACE} * black and white",
            f"to|into|be|in|en {_COLOUR}",
        ),
    ),
    Rule(
        "simple",
        "it changes what something is made of",
        0.9,
        (
            "texture|textured|finish|surface|material|pattern|patterned|polka|struktur|muster",
            f"{_REPLACE}|into|in|of|like|comme|wie * {_MATERIAL}",
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
            "this|these|that one|product|object|person",
        ),
        (ControlType.DEPTH,),
    ),
    Rule(
        "complex",
        "it replaces one thing by another",
        0.85,
        (
            f"{_REPLACE} * with|by|for|into|contre|par|en|durch|gegen|in",
            "instead|place of",
            "a la place de",
            "anstelle|statt",
            "an die stelle",
            "make the * a|an",
        ),
        (ControlType.DEPTH,),
    ),
    Rule("simple", "it changes a colour", 0.8, (_COLOUR, "brighter|darker|lighter|heller|dunkler|eclaircis")),
    Rule("simple", "it changes what something is made of", 0.7, (_MATERIAL,)),
    Rule("simple", "it changes the background", 0.7, (_PLACE, "snow|rain|fog|sunset|night|neige|schneien|regnen")),
)
