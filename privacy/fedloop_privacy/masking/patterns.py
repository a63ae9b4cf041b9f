"""Patterns for what Presidio's default recognisers miss without a trained model, or find too slowly.

They run on a folded text (ASCII digits, plain dashes and quotes, no accents), each in time linear in its length: every repetition
is bounded or possessive, and none is nested in another over the same characters. A pattern that runs past its time raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

import regex

from fedloop_privacy.masking.spans import Span


@dataclass(frozen=True, slots=True)
class Pattern:
    """One pattern of one entity type. The group `v`, where there is one, is the value. `needs` is a class of characters without
    which it cannot match, so that most texts skip most patterns.
    """

    type: str
    score: float
    needs: str
    source: str
    compiled: regex.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "compiled", regex.compile(self.source, regex.VERBOSE))

    def spans(self, text: str, until: float | None) -> Iterator[Span]:
        """Its matches. Raises `TimeoutError` when the monotonic clock passes `until`; with None no clock is read."""
        group = "v" if "v" in self.compiled.groupindex else 0
        for match in self.compiled.finditer(text, timeout=None if until is None else max(until - monotonic(), 1e-3)):
            start, end = match.span(group)
            if start < end:
                yield Span(start, end, self.type, self.score)


DIGIT, AT, DOT, SPELLED_AT, LETTER = "digit", "at", "dot", "spelled at", "letter"

_MONTH = """
    (?:(?i:jan(?:uary|uar|vier)?|feb(?:ruary|ruar)?|fevrier|mar(?:ch|s|zo)?|maerz|marz|apr(?:il)?|avril|mai|june?|juni
    |juin|july?|juli|juillet|aug(?:ust)?|aout|sept?(?:ember|embre)?|o[ck]t(?:ober|obre)?|nov(?:ember|embre)?
    |de[cz](?:ember|embre)?)\\b|May\\b|MAY\\b)"""
_DAY = "(?:[12]\\d|3[01]|0?[1-9])"
_ORDINAL = f"{_DAY}(?:(?i:st|nd|rd|th)|\\.)?+"
_YEAR = "(?:1[89]\\d\\d|20\\d\\d)"
_CLOCK = "(?:[T ,]{1,2}\\d{1,2}:\\d\\d(?::\\d\\d)?(?:\\.\\d{1,6})?(?:\\ ?(?i:am|pm|Z)\\b)?)?+"

DATES = (
    Pattern("DATE_TIME", 0.7, DIGIT, rf"(?<!\d)\d{{4}}([-/.]){_DAY}\g<1>{_DAY}(?!\d){_CLOCK}"),
    Pattern("DATE_TIME", 0.7, DIGIT,
        rf"""(?<![\d/.-]){_DAY}\ ?([-/.])\ ?{_DAY}\ ?\1\ ?(?:{_YEAR}|\d\d)(?![\d]|[-/]\d){_CLOCK}"""),
    Pattern("DATE_TIME", 0.8, DIGIT,
        rf"""(?<!\w){_ORDINAL}(?:\ (?i:of))?[\ -]?{_MONTH}\.?(?:,?[\ -]?(?:{_YEAR}|'?\d\d)(?!\d))?{_CLOCK}"""),
    Pattern("DATE_TIME", 0.8, DIGIT,
        rf"""(?<!\w){_MONTH}\.?[\ -]?{_DAY}(?!\d)(?i:st|nd|rd|th)?(?:,?\ ?{_YEAR}(?!\d))?{_CLOCK}"""),
    Pattern("DATE_TIME", 0.8, DIGIT, rf"(?<!\w){_MONTH}\.?,?[\ -]?{_YEAR}(?!\d)"),
    Pattern("DATE_TIME", 0.8, DIGIT,
        rf"""(?i)(?<!\w){_DAY}(?:(?:st|nd|rd|th)(?:\ of)?\ may\b|\ may\ {_YEAR})(?:,?\ {_YEAR})?"""),
    Pattern("DATE_TIME", 0.8, DIGIT, rf"(?<!\w)may\ {_DAY}(?:st|nd|rd|th)?,?\ {_YEAR}(?!\d)"),
    Pattern("DATE_TIME", 0.6, DIGIT, rf"""
        (?i)\b(?:born|since|in|year|founded|established|from|until|till|before|after|during|of)\ (?<v>{_YEAR})\b
        (?![.,]\d)"""),
    Pattern("DATE_TIME", 0.7, DIGIT, r"""
        (?i)\b(?:exp(?:iry|ires|iration|iring)?|valid|dob|born|birth(?:day|date)?)\b\W{0,3}(?:date|on|in|is|thru
        |until|:|,|\ ){0,4}(?<v>\d{1,2}\ ?[-/.]\ ?\d{2,4}(?:\ ?[-/.]\ ?\d{2,4})?)"""),
)  # fmt: skip

AGES = (
    Pattern("AGE", 0.7, DIGIT, r"(?i)(?<!\w)(?<v>\d{1,3})(?=\ ?-?(?:years?|yrs?|months?)(?:\ |-)olds?\b)"),
    Pattern("AGE", 0.7, DIGIT, r"(?i)(?<!\w)(?<v>\d{1,3})(?=\ ?(?:y/?o\b|y/))"),
    Pattern("AGE", 0.7, DIGIT,
        r"""(?i)\b(?:aged?(?:\ is|\ of|:)?|turn(?:s|ed|ing)?)\ (?<v>\d{1,3})(?![\d.,:/%-]\w|\w|%)"""),
    Pattern("AGE", 0.6, DIGIT, r"""
        (?i)\b(?:i\ am|i'm|(?:he|she)\ (?:is|was)|(?:he|she)'s|they\ were|was\ only|am\ already)\ (?<v>\d{1,3})
        (?=\s*+(?:[.!?;)]*+\s*+$|[.,!?;]\ |and\b|years?\b|but\b|so\b|now\b))"""),
)  # fmt: skip

_TLD = """
    (?:com|org|net|edu|gov|mil|int|info|biz|io|co|me|app|dev|ai|eu|online|site|shop|store|xyz|bank|email|cloud|tech|club
    |top|live|tv|uk|us|ca|au|nz|ie|de|fr|es|it|pt|nl|be|lu|ch|at|dk|se|no|fi|is|pl|cz|sk|si|hr|hu|ro|bg|gr|cy|mt|ee|lv
    |lt|ua|ru|by|tr|il|ae|sa|eg|za|ng|ke|gh|in|pk|bd|lk|cn|hk|tw|jp|kr|sg|my|th|vn|id|ph|br|ar|cl|mx|pe|ve|uy)\\b"""
_LOCAL = r"[\w.!#$%&'*+/=?^`{|}~-]"
_ATS = r"""
    (?:@|\(\s?(?i:at|@)\s?\)|\[\s?(?i:at|@)\s?\]|\{\s?(?i:at|@)\s?\}|<\s?(?i:at|@)\s?>|\ (?i:at)\ (?=[\w-]{1,63}
    (?:\ (?i:dot|punkt|point)\ |\ ?[(\[{]\s?(?i:dot|\.))))"""
_DOTS = r"(?:\ ?\.\ ?|\ ?[(\[{<]\s?(?i:dot|\.|punkt)\s?[)\]}>]\ ?|\ (?i:dot|punkt|point)\ )"

NETWORK = (
    Pattern("EMAIL_ADDRESS", 0.95, AT, rf"{_LOCAL}{{1,256}}+@[\w-]{{1,63}}+(?:\.[\w-]{{1,63}}+){{1,10}}+"),
    Pattern("EMAIL_ADDRESS", 0.9, AT, r'"[^"\n]{1,64}"@[\w-]{1,63}+(?:\.[\w-]{1,63}+){1,10}+'),
    Pattern("EMAIL_ADDRESS", 0.9, SPELLED_AT,
        rf"""[\w.+-]{{1,64}}+\s{{0,2}}{_ATS}\s{{0,2}}[\w-]{{1,63}}+(?:{_DOTS}[\w-]{{2,63}}){{0,3}}{_DOTS}(?i:{_TLD})"""),
    Pattern("EMAIL_ADDRESS", 0.8, AT, rf"""
        [\w.+-]{{1,64}}+(?:(?:\.|\ dot\ )[\w-]{{1,30}}+)?+@[\w-]{{1,63}}+\ ?(?:dot|\(dot\)|\[dot\])\ ?(?i:
        {_TLD})"""),
    Pattern("URL", 0.6, DOT, r"(?i)(?:https?|ftp|wss?)://[^\s<>\"']{1,2000}+"),
    Pattern("URL", 0.6, DOT, rf"""
        (?i)(?<![\w@.-])(?:[\w-]{{1,63}}\.){{1,20}}(?:{_TLD})(?!\.\w|-)(?::\d{{1,5}})?(?:[/?\#]
        [^\s<>\"']{{0,2000}}+)?"""),
    Pattern("IP_ADDRESS", 0.8, DIGIT, r"(?<![\d.])(?:\d{1,3}\ ?(?:\.|\[\.\]|\(\.\))\ ?){3}\d{1,3}(?![\d]|\.\d)"),
)  # fmt: skip

# Whether one of `_ATS` stands in a text, other than "@": beginning with a letter, so that most of a text is passed over quickly.
_SPELLED_AT = regex.compile(
    r"[aA][tT](?:\s?[)\]}>]|\ [\w-]{1,63}+(?:\ (?i:dot|punkt|point)\ |\ ?[(\[{]\s?(?i:dot|\.)))", regex.VERBOSE
)

# One separator may stand between two digits of a number, also a line break, or a space on each side of a dash.
_SEP = r"(?:[-./_]|[\ \t\r\n]{1,2}|\ -\ |\)\ ?|\ ?\(|)"
_SPELLED = "(?i:zero|oh|one|two|three|four|five|six|seven|eight|nine|double|triple)"
_CODE = r"(?<v>(?=[A-Za-z/-]{0,20}+\d)[A-Za-z0-9][\w/-]{2,30})(?![\w@])"

NUMBERS = (
    Pattern("US_SSN", 0.85, DIGIT, r"(?<![\d])(?<![\d][-.])\d{3}([-.\ _/])\d{2}\1\d{4}(?!\d)"),
    Pattern("US_SSN", 0.9, DIGIT,
        r"""(?i)(?:ssn|social\ security|tax\ id|itin)[^\d\n]{0,24}(?<v>\d{3}\W{0,3}\d{2}\W{0,3}\d{4})(?!\d)"""),
    Pattern("PHONE_NUMBER", 0.7, DIGIT,
        rf"""(?<![\d\w])(?:\+|00)\ ?[1-9]{_SEP}(?:\d{_SEP}){{5,16}}\d(?:\ ?(?i:x|ext\.?)\ ?\d{{1,6}})?"""),
    Pattern("PHONE_NUMBER", 0.7, DIGIT,
        r"""(?<!\d)\(\+?\d{1,5}\)[\ -]?(?:\d[-.\ ]?){4,12}\d(?:\ ?(?i:x|ext\.?)\ ?\d{1,6})?"""),
    Pattern("PHONE_NUMBER", 0.7, DIGIT, r"(?<!\d)\d{3}[-.\ ]?\d{3}[-.\ ]?\d{4}\ ?(?i:x|ext\.?)\ ?\d{1,6}(?!\d)"),
    Pattern("PHONE_NUMBER", 0.6, DIGIT, rf"""
        (?i)\b(?:phone|tel|telephone|mobile|cell(?:phone)?|handy|fax|whatsapp|call|text|ring|reach|dial)\b
        [^\d\n+]{{0,24}}(?<v>[+(]?\d(?:{_SEP}\d){{5,16}})(?!\d)"""),
    Pattern("PHONE_NUMBER", 0.45, DIGIT, r"(?<![\d.,/-])0\d{2,4}[\ -]\d{3,4}[\ -]?\d{3,4}(?![\d])"),
    Pattern("IBAN_CODE", 0.8, DIGIT, r"""
        (?i)(?<![A-Z0-9])(?![A-Z]{2}\d{2}\ ?[A-Z\ ]{11})[A-Z]{2}\d[-.\ \n]?\d(?:[-.\ \n]{0,2}[A-Z0-9]){4}
        (?:[-.\ \n]{0,2}\d(?:[A-Z]?[-.\ \n]{0,2}(?=\w?\d))?){7,26}[A-Z]{0,3}\b"""),
    Pattern("IBAN_CODE", 0.8, DIGIT, r"(?i)(?<!\w)[A-Z]\ [A-Z]\ \d\ \d(?:\ [A-Z0-9]){10,32}(?!\w)"),
    Pattern("ACCOUNT_NUMBER", 0.35, DIGIT, rf"(?<![\d])\d(?:{_SEP}\d){{6,40}}"),
    Pattern("ACCOUNT_NUMBER", 0.35, DIGIT, r"(?<!\d)\d{6,}+"),
    Pattern("ACCOUNT_NUMBER", 0.8, DIGIT,
        r"""(?i)\b(?:account|acct|a/c|sort\ code)(?:\ (?:number|no\.?|nr))?(?:\ is|:)?\ \#?(?<v>\d(?:[\ -]?\d){5,20}+)"""),
    Pattern("ACCOUNT_NUMBER", 0.5, DIGIT, r"(?<![\d-])\d{2}-\d{2}-\d{2}(?![\d-])"),
    Pattern("ACCOUNT_NUMBER", 0.5, DIGIT, r"""
        (?i)\b(?:end(?:s|ing)?(?:\ (?:in|with))?|last\ (?:four|4)(?:\ digits?)?(?:\ (?:are|is)|:)?)\ (?<v>\d{4})
        (?!\d)"""),
    Pattern("ACCOUNT_NUMBER", 0.5, LETTER, rf"\b{_SPELLED}(?:[\ ,-]{{1,2}}{_SPELLED}){{5,40}}\b"),
    Pattern("ACCESS_CODE", 0.5, DIGIT, r"""
        (?i)\b(?:pin|cvv2?|cvc|otp|pass(?:word|code)|security\ code|sms\ code)(?:\ (?:code|number))?(?:\ is|:|
        \ =|=)?\ ?(?<v>(?=\S{0,30}\d)[^\s<>]{3,31})"""),
    Pattern("REFERENCE", 0.75, DIGIT, rf"""
        (?i)\b(?:ref(?:erence)?|booking|order|ticket|case|customer|policy|invoice|member(?:ship)?|account|acct
        |licen[cs]e|passport|tracking|transaction|confirmation|client|user|iban|swift|routing|sort\ code
        |national\ insurance|ni|id|vat|plate|vin)\.?(?:\ (?:number|num|no\.?|id|code|ref))?\ ?[:\#]?\ ?(?:is\ )?
        {_CODE}"""),
    Pattern("REFERENCE", 0.4, DIGIT,
        r"""(?<![\w<])(?=(?:[A-Z-]{0,12}+\d){3})(?=[\d-]{0,20}+[A-Z])[A-Z0-9](?:-?[A-Z0-9]){5,34}(?!\w)"""),
    Pattern("UK_NINO", 0.7, DIGIT, r"(?i)(?<!\w)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z](?:\ ?\d){6}\ ?[A-D](?!\w)"),
)  # fmt: skip

_HEXADECIMAL = regex.compile(r"(?<!\w)0[xX][0-9A-Fa-f]{1,8}(?!\w)")
"""A literal of 32 bits, such as an error code. Longer ones may be somebody's wallet, or hide a card's number."""
_UNINTRODUCED: Final = {"ACCOUNT_NUMBER": 0.35, "REFERENCE": 0.4}
"""The scores of what is found by its digits alone, with no word beside it that says what it is."""

_NAMEWORD = r"(?:[A-Z][\w'.-]{0,30}+)"
_STREET_WORD = r"""
    (?:(?:Alley|Arcade|Avenue|Bayou|Beach|Bluff|Bottom|Boulevard|Branch|Bridge|Brook|Burg|Bypass|Camp|Canyon|Cape|Causeway
    |Center|Circle|Cliff|Close|Club|Common|Corner|Course|Court|Cove|Creek|Crescent|Crest|Crossing|Crossroad|Curve|Dale
    |Dam|Divide|Drive|Estate|Expressway|Extension|Fall|Ferry|Field|Flat|Ford|Forest|Forge|Fork|Forks|Fort|Freeway
    |Garden|Gateway|Glen|Green|Grove|Harbor|Haven|Highway|Hill|Hollow|Inlet|Island|Isle|Junction|Key|Knoll|Lake|Land
    |Landing|Lane|Light|Loaf|Lock|Lodge|Loop|Mall|Manor|Meadow|Mill|Mission|Motorway|Mount|Mountain|Neck|Orchard|Oval
    |Overpass|Park|Parkway|Pass|Passage|Path|Pike|Pine|Place|Plain|Plaza|Point|Port|Prairie|Radial|Ramp|Ranch|Rapid
    |Rest|Ridge|Rise|River|Road|Route|Row|Rue|Run|Shoal|Shore|Skyway|Spring|Spur|Square|Station|Stravenue|Stream
    |Street|Summit|Terrace|Throughway|Trace|Track|Trafficway|Trail|Tunnel|Turnpike|Underpass|Union|Valley|Via|Viaduct
    |View|Village|Ville|Vista|Walk|Wall|Way|Well)s?
    |Ave|Blvd|Cir|Cres|Ct|Dr|Heights|Hwy|Ln|Mews|Pkwy|Pl|Rd|Sq|St|Ter|Trl)\b\.?"""
_SUFFIXED = r"""
    (?<![A-Za-z])[A-Z][a-z]{3,40}+(?<=strasse|str|gasse|weg|platz|allee|ufer|straat|laan|plein|gracht|dreef|vej
    |gade|gatan|gata|vagen|veien|vei|stien|katu|tie|polku|kuja|tanav|puiestee|utca|iela|gatve)"""
_STREET_LEAD = """
    (?:Rue|Avenue|Boulevard|Chemin|Quai|Cours|Via|Viale|Piazza|Corso|Largo|Calle|C/|Avda\\.?|Avenida|Plaza|Paseo|Camino
    |Rua|Travessa|Estrada|ul\\.|Ulica|al\\.|Os\\.|Strada|Str\\.|Sos\\.|Ulitsa|Jalan|Jl\\.|Am|An\\ der|Im|Auf\\ der
    |Unter\\ den|Zum|Zur)"""
_UNIT = r"""
    (?:Suite|Ste\.?|Apt\.?|Apartment|Unit|Flat|Studio|Room|Rm\.?|Floor|Building|Bldg\.?|Box|No\.?)"""
_UNITS_OF_MEASURE = """
    pounds?|dollars?|euros?|usd|gbp|eur|bucks?|quid|points?|days?|hours?|minutes?|weeks?|months?|years?|times|people|of|in|on|at
    |to|for|from|and|or|is|was"""
# What may follow a street: units, places, postcodes and states, up to seven pieces, never a word in lower case.
_TAIL = rf"""
    (?:[,\s]{{1,4}}(?:{_UNIT}\ ?\#?\w{{1,6}}|[A-Z]{{2}}\b|[A-Z]{{1,2}}\d[A-Z\d]?\ ?\d[A-Z]{{2}}\b|[A-Z]?-?
    \d{{3,6}}(?:[\ -]\d{{2,4}}|\ [A-Z]{{2}}\b)?\b)){{1,6}}+"""

# Lines of places that follow a unit: a comma or a line break, then words with capitals and perhaps a postcode.
_LINES = r"""
    (?:\s{0,2}[,\n>?]{1,5}\s{0,6}(?:[A-Z][\w'.-]{1,30}+(?:\ [A-Z][\w'.-]{0,30}+){0,3}(?:\ \d{3,6}(?!\d))?|
    \d{3,6}\b(?:\ [A-Z]{2}\b)?)){0,5}"""

ADDRESSES = (
    Pattern("STREET_ADDRESS", 0.8, DIGIT, rf"""
        (?<![\w])\d{{1,6}}[A-Za-z]?(?:[-/]\d{{1,4}})?,?\ (?:\d{{1,5}}(?:st|nd|rd|th)?\ )?
        (?:{_NAMEWORD}\ ){{0,4}}?{_NAMEWORD}\ (?:{_STREET_WORD}|(?=[A-Z]{{2}})(?i:{_STREET_WORD}))
        (?:\ (?:N|S|E|W|NE|NW|SE|SW|North|South|East|West)\b\.?)?(?:{_TAIL})?"""),
    Pattern("STREET_ADDRESS", 0.7, DIGIT, rf"""
        (?<!\w)\d{{1,6}}[A-Za-z]?\ (?i:(?!(?:and|more|the|{_UNITS_OF_MEASURE})\b)[a-z'.]{{2,20}}\ ){{1,3}}
        (?i:street|avenue|ave|road|rd|boulevard|blvd|lane|drive|crescent|terrace|parkway|turnpike|expressway|motorway|freeway
        |highway|junctions?|cliffs?|mews|causeway|bypass|throughway|viaduct|underpass|overpass|bluffs?|bayou|burgs?|inlet
        |shoals?|knolls?|ville|hollow|crossroads?|stravenue|trafficway|close)\b(?:{_TAIL})?"""),
    Pattern("STREET_ADDRESS", 0.6, DIGIT, rf"""
        (?<!\w)(?:{_NAMEWORD}\ ){{1,3}}(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Drive|Crescent
        |Terrace|Parkway)\b\.?\ ?\d{{1,5}}\b(?:{_TAIL})?"""),
    Pattern("STREET_ADDRESS", 0.7, DIGIT, rf"{_SUFFIXED}\.?\ \d{{1,4}}\ ?(?:[a-zA-Z]\b|/\d{{1,3}})?(?:{_TAIL})?"),
    Pattern("STREET_ADDRESS", 0.7, DIGIT, rf"""
        (?<![\w])(?:\d{{1,5}}[a-z]?,?\ )?{_STREET_LEAD}\ (?:(?:de|du|des|la|le|les|della|del|dei|di|da|do|dos
        |das|los|las|el|d'|l')\ ?){{0,3}}{_NAMEWORD}(?:\ (?:de\ |da\ |di\ )?{_NAMEWORD}){{0,3}},?\ \d{{1,5}}
        [a-z]?\b(?:{_TAIL})?"""),
    Pattern("STREET_ADDRESS", 0.7, DIGIT, rf"""
        (?<![\w])\d{{1,5}}[a-z]?,?\ (?:{_NAMEWORD}\ ){{0,2}}(?i:rue|avenue|boulevard|chemin|via|viale|calle
        |avenida|rua)\ (?:(?:de|du|des|la|le|les|della|del|di|da|do)\ ){{0,3}}{_NAMEWORD}
        (?:\ {_NAMEWORD}){{0,2}}(?:{_TAIL})?"""),
    Pattern("STREET_ADDRESS", 0.6, DIGIT, rf"""
        (?<![\w.,$])\d{{3,6}},?\ (?!(?i:{_UNITS_OF_MEASURE})\b)[A-Za-z][A-Za-z'.-]{{1,20}}+(?:\ [A-Za-z][A-Za-z'.-]{{1,20}}+)?
        \ (?i:{_STREET_WORD})(?:{_TAIL})?"""),
    Pattern("STREET_ADDRESS", 0.7, DIGIT, rf"""
        (?<!\w)(?i:flat|studio|apartment|apt\.?|unit|suite)\ \d{{1,4}}[A-Za-z]?,?\s{{1,2}}
        [A-Za-z][A-Za-z'.-]{{1,20}}+(?:\ [A-Za-z][A-Za-z'.-]{{1,20}}+)?\ (?i:{_STREET_WORD})(?:{_TAIL})?"""),
    Pattern("STREET_ADDRESS", 0.6, DIGIT, r"(?i)(?<!\w)(?:flat|studio)\ (?:\d{1,3}[a-z]?|[a-z]\d{1,3})(?!\w)"),
    Pattern("STREET_ADDRESS", 0.75, DIGIT, rf"""
        (?<!\w)(?:\d{{1,6}}\ )?(?:{_NAMEWORD}\ |(?i:rue|de|du|des|la|le|der|van|nad|na)\ ){{1,5}}+(?:\d{{1,5}}
        [a-z]?\b\.?|)[\s,>?]{{0,8}}(?i:Suite|Apt\.?)\ \d{{1,5}}{_LINES}"""),
    Pattern("STREET_ADDRESS", 0.7, DIGIT, rf"(?<!\w)(?i:suite|apt\.?|apartment)\ \#?\d{{1,5}}[A-Z]?\b{_LINES}"),
    Pattern("STREET_ADDRESS", 0.7, DIGIT, rf"(?<!\w){_UNIT}\ (?:\#\ ?)?(?:\d{{1,5}}[A-Z]?)\b(?:{_TAIL})?"),
    Pattern("STREET_ADDRESS", 0.8, DIGIT,
        r"""(?i)(?<!\w)(?:P\.?\ ?O\.?\ ?Box\ \d{1,6}|PSC\ \d{1,5},?\ Box\ \d{1,5}|Unit\ \d{1,5}\ Box\ \d{1,5})\b"""),
    Pattern("STREET_ADDRESS", 0.8, DIGIT, r"""
        (?i)(?<!\w)(?:(?:USNS|USS|USCGC|USNV)\ [A-Z]\w{1,20}[\s,]{1,3})?(?:APO|FPO|DPO),?\ (?:AA|AE|AP)\ \d{5}
        (?:-\d{4})?"""),
)  # fmt: skip

POSTCODES = (
    Pattern("POSTCODE", 0.7, DIGIT,
        r"""(?<!\w)(?:[A-Za-z]{1,2}\d[A-Za-z\d]?\ ?\d[A-Za-z]{2}|[A-Za-z]\d[A-Za-z][\ -]?\d[A-Za-z]\d)(?!\w)"""),
    Pattern("POSTCODE", 0.7, DIGIT, r"(?<![\d-])\d{5}-\d{4}(?![\d-])"),
    Pattern("POSTCODE", 0.6, DIGIT,
        r"""(?<!\w)(?:[A-Z]{2},?\ \d{5}|(?:[A-Z]{1,2}-)\d{4,5}|\d{2}-\d{3}|\d{3}\ \d{2}(?=\ [A-Z]))(?![\w-]|\.\d)"""),
    Pattern("POSTCODE", 0.6, DIGIT, r"(?<!\w)[1-9]\d{3}\ (?!AM|PM|US|UK|EU|OK|KM|KG|GB|MB|ID|IT)[A-Z]{2}(?!\w)"),
    Pattern("POSTCODE", 0.6, DIGIT, r"""
        (?i)\b(?:zip|zip\ ?code|post\ ?code|postal\ ?code|plz|cap|postnummer)(?:\ (?:is|to|from)|:)?\ ?(?<v>(?=
        [A-Z]{0,4}+\d)[A-Z\d-]{3,10}(?:\ (?=[A-Z]{0,3}+\d|[A-Z]{2}\b)[A-Z\d]{2,4})?)(?!\w)"""),
)  # fmt: skip

# Letters swapped for digits in a name that is introduced as one.
LEET_NAMES = (Pattern("PERSON", 0.5, DIGIT, r"(?i)\bname(?:\ is|'s|:)\ (?<v>(?=[a-z]*+\d)\w{2,20}(?:\ (?=[a-z]*+\d)\w{2,20})?)"),)

ORGANISATIONS = (
    Pattern("ORGANIZATION", 0.5, LETTER, r"""
        (?<!\w)(?:[A-Z][\w&'-]{1,30}+,?\ (?:and\ |&\ |of\ )?){1,4}(?:Inc|LLC|Ltd|Limited|PLC|Plc|plc|GmbH|Corp
        |Corporation|S\.?A\.|SARL|S\.?p\.?A|AG|B\.?V|Oy|AB|A/S|LLP|and\ Sons)\b\.?"""),
    Pattern("ORGANIZATION", 0.5, LETTER, r"(?<!\w)[A-Z][a-z']{2,20}+,\ [A-Z][a-z']{2,20}+\ and\ [A-Z][a-z']{2,20}+"),
)  # fmt: skip

ALL = (*NETWORK, *NUMBERS, *DATES, *AGES, *ADDRESSES, *POSTCODES, *LEET_NAMES, *ORGANISATIONS)


def present(text: str) -> set[str]:
    """The classes of characters that a text holds, of those that patterns need."""
    found = {LETTER}
    if any(map(str.isdigit, text)):
        found.add(DIGIT)
    if "." in text:
        found.add(DOT)
    if "@" in text:
        found |= {AT, SPELLED_AT}
    elif _SPELLED_AT.search(text):
        found.add(SPELLED_AT)
    return found


def find(text: str, until: float) -> list[Span]:
    """All matches in a folded text. Raises `TimeoutError` when the monotonic clock passes `until`."""
    there = present(text)
    found = [_checked(text, span) for pattern in ALL if pattern.needs in there for span in pattern.spans(text, until)]
    literals = [match.span() for match in _HEXADECIMAL.finditer(text)] if DIGIT in there else []
    return [span for span in found if not (literals and _is_literal(span, literals))]


def _is_literal(span: Span, literals: list[tuple[int, int]]) -> bool:
    """Whether it is part of one, and nothing says that it is more than that."""
    if span.score > _UNINTRODUCED.get(span.type, 0.0):
        return False
    return any(start <= span.start and span.end <= end for start, end in literals)


def _checked(text: str, span: Span) -> Span:
    """A number that satisfies the card checksum (ISO/IEC 7812-1) is called a card."""
    if span.type != "ACCOUNT_NUMBER":
        return span
    digits = "".join(filter(str.isdigit, text[span.start : span.end]))
    return span._replace(type="CREDIT_CARD", score=0.9) if 12 <= len(digits) <= 19 and luhn(digits) else span


def luhn(digits: str) -> bool:
    """Whether decimal digits satisfy the card checksum (ISO/IEC 7812-1, annex B)."""
    values = [int(each) for each in digits]
    doubled = (value * 2 - 9 if value > 4 else value * 2 for value in values[-2::-2])
    return (sum(values[-1::-2]) + sum(doubled)) % 10 == 0
