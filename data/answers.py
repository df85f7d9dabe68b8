r"""Is an answer the same as the true one? For problems with one short answer, as in GSM8K and MATH.

    answers_equal(extract_prediction(response), r"\frac{1}{2}")

Exact rational arithmetic in linear time, standard library only; nothing that a model wrote is ever
evaluated. Two answers are equal if they are the same text, LaTeX layout aside, or the same number:

    1,000 = 1000     0.5 = .5 = 1/2 = \frac12     3\frac{1}{2} = 3 1/2 = 7/2     10^3 = 1e3 = 1000
    (0.5, 1) = \left(\frac{1}{2},1\right)         \text{(b)} = (B) = B           \sqrt2 = \sqrt{2}

A bare number equals itself with a label or a unit; two labels or two units must agree:

    5 = x=5 = 5 \text{ cm} = 5 apples             18 = \$18     50 = 50\%     90 = 90^\circ
    x=5 is not y=5, 5 cm not 5 m, 50\% not 0.5, 5 million not 5, 5x not 5; but 5 hours = 5 hour

Where notation is ambiguous:

    commas      1,234 is a number; 1, 234 and 1,2 and 1,234,56 are lists; (1,234) has two entries
    letters     b is a variable and not B; one letter in parentheses is an option, (b) = (B) = B
    order       counts, in sets too: \{1,2\} is not \{2,1\}; (1,2), [1,2] and 1,2 all differ
    arithmetic  one fraction, one power of ten, nothing else: 2^{10}, 1+1 and 1/2/3 are text
    limits      inf, nan, powers of ten beyond 999 and numbers of over 500 characters are text
"""
import re
from fractions import Fraction

SIGNS = str.maketrans({
    "−": "-", "×": "*", "·": "*", "²": "^2", "³": "^3", "π": r"\pi", "√": r"\sqrt",
    "∞": r"\infty", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq "})
FENCES = [("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}")]
BRACKETS = re.compile(r"[(\[]|\\\{")
THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])")
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox) ?\{([^{}]*)\}", r" \1 "),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
    (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
    (r"\\([lgn]e)(?![A-Za-z])", r"\\\1q"),
    (r" +", " "),
    (r"(?<![\w.}]) | (?![\w.])", ""),  # not between words or digits
    (r"(?<!\\)\\([%$])", r"\1"),
    (r"\^\{?\\circ\}?|\\degree(?![A-Za-z])", "°"),
    (r"\\[dtc]frac", r"\\frac"),
    # Braces that LaTeX can do without: \sqrt2, \frac12, \frac1{2}, \frac{\sqrt{3}}2, x^2.
    (r"\\(frac|sqrt) ?([0-9A-Za-z])", r"\\\1{\2}"),
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9A-Za-z])", r"\1{\2}"),
    (r"([\^_])(-?[0-9]+|[A-Za-z])", r"\1{\2}"),
]]
SEPARATORS = re.compile(r"([,()\[\]]|\\[{}])")
FRACTION = re.compile(r"\\frac\{([-+0-9.]+)\}\{([-+0-9.]+)\}")
LOOSE_BLANK = re.compile(r"(?<![0-9.]) | (?![0-9.])")  # not between two numbers

DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
NOT_UNITS = ("and|or|plus|minus|times|hal(?:f|ves)|"
             "(?:dozen|(?:ten|hundred|thousand|[mbtr]+illion)(?:th)?)s?|pi|squared|cubed|factorial")
WORD = rf"(?!(?i:{NOT_UNITS})\b)(?:[A-Za-z]{{2,}}|[mgsh])(?:\^\{{[23]\}})?"  # 5 m, not 5 x
QUANTITY = re.compile(rf"""
    (?:(?P<label>\\?[A-Za-z][\w{{}}]*)=)?  (?P<prefix>[-+$€£ ]{{0,3}})
    (?: (?:(?P<whole>[0-9]+)\ (?=[0-9]+/[0-9]+(?![0-9.])))?
        (?P<top>{DECIMAL}(?:[eE][-+]?[0-9]{{1,3}})?)  (?:/(?P<bottom>-?{DECIMAL}))?
      | (?:(?P<factor>{DECIMAL})\*)?  10\^\{{(?P<power>[-+]?[0-9]{{1,3}})\}} )
    (?P<unit>\ ?[%°$€£]|(?:\ {WORD}(?:[ /]{WORD})*))?""", re.VERBOSE)
LONGEST = 500  # characters of a number
PLURAL = re.compile(r"(?<=[a-z]{3})s\b")  # ms is no plural of m
SYMBOLS = {"$": "dollars", "%": "percent", "°": "degrees"}


def answers_equal(prediction: bytes | None, truth: str) -> bool:
    """Whether both say the same. No prediction, or an empty one, equals nothing."""
    left = layout_free((prediction or b"").decode("utf-8", "surrogateescape"))
    right = layout_free(truth)
    # (x,1) -> "", "(", "x", ",", "1", ")", ""
    lefts, rights = SEPARATORS.split(left), SEPARATORS.split(right)
    return left != "" and len(lefts) == len(rights) and all(map(same, lefts, rights))


def layout_free(text: str) -> str:
    r"""One spelling for what looks alike: no $ around it, no \left, no 1,000, all braces."""
    text = " ".join(text.translate(SIGNS).split())
    for left, right in FENCES * 2:  # one may contain another
        text = re.sub(r"(?<!\.)\.$", "", text).strip()  # not the dots of 0.333...
        if text.startswith(left) and text.endswith(right):
            text = text[len(left):-len(right)].strip()
    text = text.replace("{,}", ",").replace(r"\!", "")
    if not BRACKETS.search(text):
        text = THOUSANDS.sub(without_commas, text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text[1].upper() if re.fullmatch(r"\([A-Za-z]\)", text) else text


def without_commas(number: re.Match) -> str:
    return number[0].replace(",", "")


def same(left: str, right: str) -> bool:
    """Whether two texts without separators are the same, or the same quantity."""
    if LOOSE_BLANK.sub("", left) == LOOSE_BLANK.sub("", right):
        return True
    left, right = quantity(left), quantity(right)
    return None not in (left, right) and all(a == b or "" in (a, b) for a, b in zip(left, right))


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
