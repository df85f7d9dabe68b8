r"""Is an answer the same as the true one? For problems with one short answer, as in GSM8K and MATH.

    answers_equal(boxed_answer(response), r"\frac{1}{2}")

Exact rational arithmetic in linear time, standard library only; nothing that a model wrote is ever
evaluated. Two answers are equal if they are the same text, LaTeX layout aside, or the same number:

    1,000 = 1\,000 = 1000    0.5 = .5 = 1/2 = \frac12    3\frac{1}{2} = 3 1/2 = 7/2    10^3 = 1e3
    \frac{\pi}{4} = pi/4     [0.5, +\infty) = \left[\frac12,\infty\right)     \sqrt2 = sqrt(2)
    \text{(b)} = (B) = B = (B) 14 = B. 14             1, 3 = 3 and 1          Yes = yes

A label or a unit may be missing; two labels or two units must agree:

    5 = x=5 = 5 \text{ cm} = 5 apples             18 = \$18     50 = 50\%     90 = 90^\circ
    x=5 is not y=5, 5 cm not 5 m, 50\% not 0.5, 5x not 5; but 5 hours = 5 hour

A unit is a noun, or two as in km/h, square feet and miles per hour. Words that count (million,
dozen, thirds, squared) and longer phrases make another answer: 5 lakh is not 5. Where notation is
ambiguous:

    commas      1,234 is a number; 1, 234 and 1,2 and 1,234,56 are lists; (1,234) has two entries
    letters     b is a variable and not B; one letter in parentheses is an option, (b) = (B) = B
    order       counts in (1,2), not in \{1,2\} and 1,2; these differ, and differ from [1,2]
    or          is not a comma, and is: 5 or 6 is not 5, 6
    rounding    0.333 is not 1/3; 15 digits are, because a float knows no more
    arithmetic  one fraction, power of ten or factorial, nothing else: 2^{10}, 1+1 are text
    limits      inf, nan, powers of ten beyond 999 and numbers of over 500 characters are text
"""
import math
import re
from fractions import Fraction
from functools import lru_cache

SIGNS = {
    "−": "-", "–": "-", "×": "*", "·": "*", "π": r"\pi", "∞": r"\infty", "∅": r"\emptyset",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "ℝ": r"\mathbb{R}", "±": r"\pm ", "≤": r"\leq ",
    "≥": r"\geq ", "≠": r"\neq ", "…": "...", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
    "\u00a0": r"\,", "\u2009": r"\,", "\u202f": r"\,"}  # narrow blanks
SIGNS |= {chr(code + 0xfee0): chr(code) for code in range(33, 127)}  # wide １ is 1
SIGNS = str.maketrans(SIGNS)
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
FENCES = [("$", "$"), (r"\[", r"\]"), (r"\boxed{", "}"), ("{", "}"), ("**", "**"), ("`", "`")]
BRACKETS = re.compile(r"[(\[]|\\\{")
THOUSANDS = r"(?<![0-9.,])[1-9][0-9]{0,2}(?:%s[0-9]{3})+(?!(?:%s)?[0-9])"
WITH_COMMAS, WITH_BLANKS = [re.compile(THOUSANDS % (mark, mark)) for mark in (",", r"\\[,;:]")]
GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"


def without_marks(number: re.Match) -> str:
    return re.sub("[^0-9]", "", number[0])


def raised(digits: re.Match) -> str:
    return "^{" + digits[0].translate(RAISED) + "}"


def factorial(number: re.Match) -> str:
    return str(math.factorial(int(number[1])))


def quotient(fraction: re.Match) -> str:
    r"""\frac{\pi}{4} -> \pi/4, \frac{x+1}{2x} -> (x+1)/(2x)"""
    before, top, bottom = fraction.groups()
    if bottom[:1] in "-+":
        return fraction[0]
    if re.search(r"[^\w\\.{}^]", re.sub(r"\{[^{}]*\}", "", top[1:])):
        top = f"({top})"
    if not re.fullmatch(r"[0-9.]+|[A-Za-z]|\\[A-Za-z]+(?:\{[^{}]*\})*", bottom):
        bottom = f"({bottom})"
    return f"{before}{top}/{bottom}"


REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox) ?\{([^{}]*)\}", r" \1 "),
    (r"(?<!\\)\\[,;: ]|(?<=[\w ])~|\\q?quad(?![A-Za-z])", " "),  # ~5 is about 5
    (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
    (r"\\([lgn]e)(?:q|qslant)?(?![A-Za-z])", r"\\\1q "),
    (r"\\varnothing(?![A-Za-z])|\\\{ ?\\\}", r"\\emptyset"),
    (r"\\[lc]?dots(?![A-Za-z])", "..."),
    (r"\\begin\{[bp]matrix\}", r"\\matrix("),
    (r"\\end\{[bp]matrix\}", ")"),
    (r"(?<![A-Za-z\\])(pi|sqrt)(?![A-Za-z])", r"\\\1"),
    (r"√ ?([0-9]+)", r"\\sqrt{\1}"),
    ("√", r"\\sqrt"),
    ("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", raised),
    (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r" +", " "),
    (r",? and ", ", "),
    (r"^ ?\(?([A-J])[):] +(?=[\w$]|-[0-9]|\\(?:[dt]?frac|sqrt|pi|\$))", r"\1. "),  # (B) 14
    (r"(?<![\w.}]) | (?![\w.])", ""),  # not between words or digits
    (r"(?<!\\)\\([%$])", r"\1"),
    (r"\^\{?\\circ\}?|\\degree(?![A-Za-z])", "°"),
    (r"(^|[=,(\[{])\+(?![-+])", r"\1"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"(?<=[0-9])\*(?=\\(?!frac)[A-Za-z]|[a-z](?![0-9]))", ""),  # 2*\pi
    (r"(?<![\w.}!^])([0-9]{1,2})!(?![\w!])", factorial),
    # Braces that LaTeX can do without: \sqrt2, \frac12, \frac1{2}, \frac{\sqrt{3}}2, x^2.
    (r"\\(frac|sqrt|mathbb|sqrt\[[0-9a-z]+\]) ?([0-9A-Za-z])", r"\\\1{\2}"),
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9A-Za-z])", r"\1{\2}"),
    (r"([\^_])(-?[0-9]+|[A-Za-z])", r"\1{\2}"),
    # Only a whole term, because \frac{\pi}{4}x is not \pi/4x, and 2\frac{1}{2} is a mixed number.
    (rf"(^|[-+=,(\[{{])\\frac{GROUP}{GROUP}(?=$|[-+=,)\]}}]|\\\}})", quotient),
]]
WORDS = re.compile("(?:(?:[A-Z]?[a-z]{2,}|a|No|YES|NO|TRUE|FALSE)(?:[ ,]+|$))+")


def layout_free(text: str) -> str:
    r"""One spelling for what looks alike: no $ around it, no \left, no 1,000, all braces."""
    text = text.replace("<=", "≤").replace(">=", "≥").translate(SIGNS)
    text = re.sub(r"(?<!\\)\\[()]", "", " ".join(text.split()))
    # A dollar sign before a number may be money: a formula ends before a blank, as in Markdown.
    text = re.sub(r"(?<!\\)\$(?! )([^$]*[^$ \\])\$(?![0-9])", r"\1", text)
    for left, right in FENCES * 2:  # one may contain another
        text = re.sub(r"(?<!\.)\.$", "", text).strip()  # not the dots of 0.333...
        if text.startswith(left) and text.endswith(right):
            text = text[len(left):-len(right)].strip()
    text = WITH_BLANKS.sub(without_marks, text.replace("{,}", ",").replace(r"\!", ""))
    if not BRACKETS.search(text):
        text = WITH_COMMAS.sub(without_marks, text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    if re.fullmatch(r"\([A-Za-z]\)|[A-J]\)", text):
        return text[-2].upper()
    return text.lower() if WORDS.fullmatch(text) else text


SEPARATORS = re.compile(r"(\\[\\{}]|[,()\[\]&])")
OPENING, CLOSING = ("(", "[", r"\{"), (")", "]", r"\}")
# The text behind a letter, as in B. 14, names no other letter.
OPTION = re.compile(r"([A-J])\.(?: |(?=\\))(?!or |[A-J]\b)(?:(?!\([A-Z]\)|\b[A-Z][.)]).)+")
LABEL = re.compile(r"(\\?[A-Za-z][\w{}]*|\([a-z](?:,[a-z])+\))(=|\\in ?(?![A-Za-z]))")
CONSTANT = re.compile(r"(?:[^A-Za-z\\=<>]|\\(?:pi|sqrt|frac|infty|cup|pm)(?![A-Za-z])|\\[{}]"
                      r"|(?<![A-Za-z])[ei](?![A-Za-z]))+")
FRACTION = re.compile(r"\\frac\{([-+0-9.]+)\}\{([-+0-9.]+)\}")
LOOSE_BLANK = re.compile(r"(?<![0-9.]) | (?![0-9.])")  # not between two numbers

DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
# Words behind a number that say more than of what there are so many.
NOT_UNITS = r"""
    (?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|[a-z]+teen)(?:e?s)?
    |(?:twen|thir|for|fif|six|seven|eigh|nine)t(?:y|ies)
    |(?:ten|hundred|thousand|[a-z]*illion)(?:th)?s?
    |(?:third|four|fif|six|seven|eigh|nin|eleven|twelf|[a-z]+teen|[a-z]+tie)(?:th)?s?|quarters?
    |fourty|nineths?|hundreths?|hal(?:f|ve)[sd]?|lakhs?|lacs?|crores?|arabs?|kharabs?|myriads?
    |googols?|dozens?|scores?|gross(?:es)?|grands?|pairs?|couples?|trios?|quartets?|[a-z]*fold|wan
    |multiples?|n[ao]ughts?|nil|quads?|ratio|proportion|decimals?|dot|carry|each|wrong|false|true
    |(?:doub|trip|[a-z]*up)le[sd]?|once|twice|thrice|kilo|mega|giga|tera|peta|exa|hecto|deca|deci
    |centi|milli|micro|nano|pico|femto|mil|thou|per(?:mille|centiles?)?|promille|basis|and|nor|not
    |plus|minus|negative|opposite|complement|times|divided|multiplied|raised|over|under|above|below
    |more|less|fewer|(?:great|larg|bigg|high|small|low|old|young)er|than|from|off|out|past|ago|mod
    |modulo|choose|squared?|cubed?|cubic|roots?|rooted|radical|factorial|power|exponent|inverse
    |reciprocal|imaginary|infinit[ey]|undefined|excluded|recurring|repeating|bar|remainder|prime
    |base|binary|octal|hex|hexadecimals?|approximately|approx|about|log|(?:arc)?(?:sin|cos|tan)|sine
    |cosine|tangent|exp|alpha|beta|gamma|delta|epsilon|zeta|theta|kappa|lambda|sigma|omega|phi|chi
    |rho|tau|eta|iota|omicron|upsilon"""
SHORT = "[cdkmn]?m|[km]?g|[cdm][lL]|[hs]|ms|k?Hz|k?Pa|k[JNWV]|ft|in|yd|mi|lbs?|oz|hrs?|yrs?|[km]ph"
WORD = rf"(?:(?:{SHORT})(?![A-Za-z])|(?!(?i:{NOT_UNITS})\b)(?=[a-z]*[aeiou])[A-Za-z][a-z]{{2,}})"
UNIT = rf"(?:(?:square|cubic)\ )?{WORD}(?:\^\{{[23]\}})?"
QUANTITY = re.compile(rf"""
    (?:(?P<label>\\?[A-Za-z][\w{{}}]*)=)?  (?P<prefix>(?:[-+]?[$€£]?|[$€£][-+])\ ?)
    (?: (?:(?P<whole>[0-9]+)\ (?=[0-9]+/[0-9]+(?![0-9.])))?
        (?P<top>{DECIMAL}(?:[eE][-+]?[0-9]{{1,3}})?)  (?:/(?P<bottom>-?{DECIMAL}))?
      | (?:(?P<factor>{DECIMAL})\*)?  10\^\{{(?P<power>[-+]?[0-9]{{1,3}})\}} )
    (?P<unit>\ ?[%°$€£]|(?:\ |(?=[ckm]m|kg|m[lL]|[km]ph)){UNIT}(?:(?:/|\ per\ ){UNIT})?)?""",
                      re.VERBOSE)
LONGEST = 500  # characters of a number
PLURAL = re.compile(r"(?<=ch|sh)es\b|(?<=[a-z]{3})s\b")  # ms is no plural of m
SYMBOLS = {"$": "dollars", "%": "percent", "°": "degrees"}
FLOAT_DIGITS = 15


def answers_equal(prediction: bytes | None, truth: str) -> bool:
    """Whether both say the same. No prediction, or an empty one, equals nothing."""
    left = layout_free((prediction or b"").decode("utf-8", "surrogateescape"))
    right = layout_free(truth)
    for text, other in (left, right), (right, left):
        option = OPTION.fullmatch(text)
        if option and option[1] == other:
            return True

    (label, left), (other, right) = unlabelled(left), unlabelled(right)
    if left == "" or label != other and (label and other or "=" in left + right):
        return False
    # (x,1) -> "", "(", "x", ",", "1", ")", ""
    lefts, rights = SEPARATORS.split(left), SEPARATORS.split(right)
    if len(lefts) == len(rights) and all(map(same, lefts, rights)):
        return True
    entries = unordered(lefts)
    return entries is not None and entries == unordered(rights)


def unlabelled(text: str) -> tuple[str, str]:
    """x=5,x=-5 -> "x=", "5,-5"; y=2x -> "", "y=2x", because no constant is on the right."""
    label = LABEL.match(text)
    if label:
        rest = text[label.end():].replace("," + label[0], ",")
        if CONSTANT.fullmatch(rest) or "=" not in rest and quantity(rest):
            return label[0], rest
    return "", text


def same(left: str, right: str) -> bool:
    """Whether two texts without separators are the same, or the same quantity."""
    one, other = key(left), key(right)
    if str in (type(one), type(other)):
        return one == other
    numbers = one[1] == other[1] or is_float_of(left, other[1]) or is_float_of(right, one[1])
    return numbers and all("" in pair or pair[0] == pair[1] for pair in zip(one[::2], other[::2]))


def is_float_of(text: str, number: Fraction) -> bool:
    """Whether a decimal gives the first 15 digits or more of a number that has no end."""
    decimal = re.fullmatch(r"-?([0-9]*)\.([0-9]+)", text)
    if not decimal or len((decimal[1] + decimal[2]).lstrip("0")) < FLOAT_DIGITS:
        return False
    places = len(decimal[2])
    endless = pow(10, 4 * LONGEST, number.denominator) != 0
    return endless and abs(Fraction(text) - number) * 10 ** places < 1


def unordered(pieces: list[str]) -> tuple[bool, list[list[str]]] | None:
    r"""\{2,1\} -> whether it is a set, its sorted entries; None if the order of the text counts."""
    is_set = pieces[:2] == ["", r"\{"] and pieces[-2:] == [r"\}", ""]
    entries, depth = [[]], 0
    for piece in pieces[2:-2] if is_set else pieces:
        depth += (piece in OPENING) - (piece in CLOSING)
        if depth < 0 or "..." in piece:
            return None
        if piece == "," and depth == 0:
            entries.append([])
        else:
            entries[-1].append(str(key(piece)))
    return is_set, sorted(entries)


@lru_cache(4096)  # a long list repeats its commas
def key(text: str) -> tuple[str, Fraction, str] | str:
    return quantity(text) or LOOSE_BLANK.sub("", text)


def quantity(text: str) -> tuple[str, Fraction, str] | None:
    """x=-3 1/2 cm -> ("x", -7/2, "cm"): label or "", exact number, unit or ""; else None."""
    text = " ".join(FRACTION.sub(r" \1/\2 ", text).split()) if len(text) <= LONGEST else ""
    match = QUANTITY.fullmatch(text)
    if not match or Fraction(match["bottom"] or 1) == 0:
        return None

    label, prefix, whole, top, bottom, factor, power, unit = match.groups(default="")
    if top:
        number = Fraction(top) / Fraction(bottom or 1)
    else:
        number = Fraction(factor or 1) * Fraction(10) ** int(power)
    if whole and number >= 1:
        return None  # 3 4/2 is no mixed number
    number = (number + int(whole or 0)) * (-1) ** prefix.count("-")
    unit = (prefix.strip("-+ ") + unit).strip()
    return label, number, PLURAL.sub("", SYMBOLS.get(unit, unit))
