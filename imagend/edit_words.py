"""The words that the rules on edits (imagend.edit_rules) are made of, in English, French and German. Pure data."""

from __future__ import annotations

COLOUR = (
    "red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|grey|gray|cyan|teal|magenta|beige|navy|golden|"
    "silver|turquoise|burgundy|blonde|blond|ginger|brunette|lavender|lilac|mustard|hazel|terracotta|obsidian|"
    "mint|olive|"
    "maroon|ivory|cream|khaki|coral|salmon|indigo|charcoal|emerald|ruby|amber|crimson|scarlet|tan|"
    "rouge|jaune|vert|verte|bleu|bleue|violette|rose|marron|noir|noire|blanc|blanche|gris|grise|roux|rousse|dore|"
    "rot|gelb|grun|blau|lila|rosa|braun|schwarz|weiss|grau|golden"
)
MATERIAL = (
    "glass|marble|wood|wooden|stone|metal|metallic|copper|bronze|iron|steel|rust|rusty|brick|bricks|velvet|silk|"
    "leather|"
    "wool|knitted|knit|parquet|paper|plastic|moss|mossy|mud|muddy|wet|snowy|frosted|crumpled|scales|fur|"
    "verre|marbre|bois|pierre|briques|soie|velours|cuir|rouille|"
    "glas|marmor|holz|stein|ziegelstruktur|verrostet|samt|seide"
)
PLACE = (
    "background|backdrop|sky|scene|scenery|setting|surroundings|weather|season|landscape|horizon|light|lighting|"
    "mood|view|"
    "location|room|wallpaper|surrounding|umgebung|zimmer|chambre|"
    "atmosphere|fond|arriere-plan|ciel|paysage|decor|meteo|saison|hintergrund|himmel|landschaft|wetter|jahreszeit"
)
WHERE = (
    "beach|forest|woods|jungle|mountain|mountains|city|street|desert|studio|kitchen|castle|park|garden|field|"
    "meadow|space|"
    "moon|mars|island|ocean|sea|lake|river|cafe|restaurant|office|library|museum|stage|stadium|rooftop|village|farm|"
    "plage|foret|montagne|ville|rue|jardin|bureau|strand|wald|berge|stadt|strasse|garten|kuche|schloss|wiese"
)
WORN = (
    "clothes|clothing|outfit|outfits|dress|gown|shirt|tshirt|t-shirt|blouse|sweater|pullover|hoodie|jacket|coat|suit|"
    "skirt|jeans|trousers|pants|shorts|shoes|sneakers|boots|hat|cap|scarf|gloves|uniform|kimono|costume|armor|armour|"
    "sunglasses|glasses|necklace|crown|helmet|mask|cape|cloak|robe|vest|tie|apron|boots|saree|sari|hijab|wig|earrings|"
    "tux|tuxedo|swimsuit|bikini|pyjamas|pajamas|kilt|dirndl|lederhosen|spacesuit|jersey|blazer|cardigan|polo|leggings|"
    "heels|sandals|slippers|belt|socks|tights|raincoat|parka|turtleneck|vest|waistcoat|beanie|headscarf|bandana|"
    "vetements|robe|chemise|veste|manteau|pantalon|jupe|chapeau|chaussures|tenue|pull|"
    "kleidung|kleid|hemd|jacke|mantel|anzug|hose|rock|hut|schuhe|mutze"
)
WHO = (
    "him|her|them|me|us|man|woman|boy|girl|kid|baby|person|people|model|mannequin|figure|lady|guy|child|king|queen|"
    "knight|statue|character|hero|heroine|dancer|bride|groom|player|wizard|mother|father|mom|mum|dad|son|daughter|"
    "brother|sister|friend|grandpa|grandma|grandfather|grandmother|everyone|everybody|head|"
    "feet|lui|elle|femme|homme|ihm|ihr|ihn|mann|frau|puppe"
)
REPLACE = "replace|replaced|swap|swapped|exchange|exchanged|substitute|substituted|switch|change|turn|transform|convert"
REPLACE += "|remplace|remplacer|echange|transforme|ersetze|ersetzen|tausche|tauschen|verwandle"
LIMB = "arm|arms|leg|legs|hand|hands|head|knee|knees|finger|fingers|foot|shoulder|shoulders|body|torso|gaze"
LIMB += "|elbow|elbows|chin|hip|hips|feet|toes|torso|back|spine|wrist|thumb|fist|fists|wings|tail|paw|paws"
LIMB += "|bras|jambe|jambes|tete|main|mains|genou|corps|kopf|beine|bein|hand|hande|knie|finger"
STANCE = (
    "sit|stand|lie|kneel|crouch|jump|run|walk|dance|wave|bow|lean|bend|point|raise|lift|hold|cross|rear|squat|fly|"
    "smile|climb|hug|shake|clap|salute|sleep|crawl|stretch|stride|stoop|assise|assis|debout|allonge|allongee|"
    "couche|couchee|accroupi|accroupie|lever|sitzen|stehen|liegen|knien|springen|winken|laufen|heben|schauen"
)

GOING = (
    "sitting|standing|lying|kneeling|crouching|jumping|running|walking|dancing|waving|bowing|leaning|bending|pointing|"
    "raising|lifting|holding|squatting|flying|climbing|hugging|sleeping|crawling|stretching|fighting|mid-jump|midair|"
    "mid-air|gebeugt|geneigt|sitzend|stehend|liegend|kniend|springend"
)
MOVED = (
    "raised|lifted|lowered|bent|crossed|folded|stretched|spread|tilted|turned|pointed|hunched|straight|straighten|"
    "upright|higher|lower|up|down|forward|backward|backwards|outstretched|apart|clasped|levee|leves|croises|tendu|"
    "neigen|geneigt|gehoben|heben|strecken|ausgestreckt|verschrankt|hoch|ans|nach"
)
