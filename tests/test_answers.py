r"""Exact answers: worked pairs, random fractions in all notations, text meant to hang or crash."""
import itertools
import random
import time
from fractions import Fraction

import pytest

from data.answers import answers_equal

# (what it guards, answers that are all equal to each other)
EQUAL = [
    ("thousands", ["1,000", "1000", "1{,}000", r"1,\!000", "1000.00", "1,000."]),
    ("two commas", ["1,234,567", "1234567"]),
    ("commas and cents", [r"\$1,234.50", "1234.5", "$1{,}234.50$"]),
    ("a half", [
        "0.5", "1/2", r"\frac12", r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", r"\frac{1}2",
        r"\frac1{2}", r"\frac 1 2", "0.50", ".5", "2/4", "$1/2$", r"\frac{ 1 }{ 2 }", "1 / 2"]),
    ("negative fractions", [
        r"-\frac{3}{4}", "-3/4", "-0.75", r"\frac{-3}{4}", r"\frac{3}{-4}", "\u2212.75"]),
    ("mixed numbers", [r"3\frac{1}{2}", r"3 \frac12", "3 1/2", "7/2", "3.5"]),
    ("the sign of a mixed number covers both parts", [r"-3\frac{1}{2}", "-3 1/2", "-7/2"]),
    ("percent", [r"50\%", "50%", "50", "50 %", "50 percent"]),
    ("money", ["$18", "18", "18.00", r"\$18", r"$\$18$", "18 dollars"]),
    ("a loss", [r"-\$5", "$-5", "-5", r"\$-5"]),
    ("options", [r"\text{(B)}", "B", "(B)", "(b)", r"\textbf{(B)}", r"\text{B}", "B."]),
    ("brackets that grow", [r"\left( 1, 2 \right)", "(1,2)", "( 1 ,2)"]),
    ("numbers in a tuple", ["(0.5, -1)", r"\left(\frac{1}{2},-1\right)", r"(\frac12, \, -1.0)"]),
    ("an interval", [r"[0.5,\infty)", r"\left[ \frac12, \infty \right)", "[1/2, \u221e)"]),
    ("a set in its order", [r"\{1,2\}", r"\left\{ 1, 2 \right\}", r"\{1.0, 2\}"]),
    ("a list that looks like thousands", ["1,234,56", "1, 234, 56"]),
    ("a list", ["1,2", "1, 2", "1.0, 2"]),
    ("a label", ["x=5", "5", "x = 5.0", "$x=5$"]),
    ("a label with an index", ["x_1=5", "5", "x_{1} = 5"]),
    ("units", [
        r"5 \text{ cm}", "5", r"5\text{cm}", "5 cm", r"5\,\mathrm{cm}", "5 cm.", r"5\mbox{ cm}"]),
    ("powers of units", [r"5 \text{ cm}^2", "5", r"5 \text{ cm}^{2}", "5 cm\u00b2"]),
    ("units of several words", ["12 miles per hour", "12", r"12\text{ miles per hour}"]),
    ("a unit that is a ratio", [r"9.8 \text{ m/s}^2", "9.8", "9.80 m/s^2"]),
    ("a unit of one letter", [r"5 \text{ m}", "5 m", "5"]),
    ("a fraction with a unit", [r"\frac{1}{2} \text{ inch}", "0.5", "1/2 inch"]),
    ("roots", [r"\sqrt{2}", r"\sqrt2", r"\sqrt 2", "\u221a2"]),
    ("pi", [r"\pi", "\u03c0", r"$\pi$"]),
    ("a multiple of pi", [r"2\pi", r"2 \pi", "2\u03c0"]),
    ("a power of ten", [
        "10^{3}", "10^3", "1000", "1e3", "1E+3", r"1\times10^3", "1.0 \u00d7 10^{3}"]),
    ("scientific notation", [r"1.2 \times 10^5", r"1.2\cdot10^{5}", "120,000", "1.2e5"]),
    ("a negative power of ten", ["10^{-2}", "10^-2", "0.01", "1/100", "1e-2"]),
    ("other powers are text", ["2^{10}", "2^10", "2 ^ 10"]),
    ("degrees", [r"90^\circ", r"90^{\circ}", "90", "90\u00b0", "90 degrees"]),
    ("a box in the box", [r"\boxed{5}", "5", r"$\boxed{5}$", r"\boxed{$5$}", r"\boxed{5}."]),
    ("fences", ["$$x^2$$", "x^2", r"\(x^2\)", r"\[ x^2 \]", r"$\boxed{x^2}$", r"\boxed{$x^2$}"]),
    ("variables", ["2x + 1", "2x+1", "$2x+1$"]),
    ("an equation", ["y = 2x", "y=2x"]),
    ("indices", ["101_2", "101_{2}"]),
    ("words", ["all real numbers", r"\text{all real numbers}", "all  real\nnumbers."]),
    ("leading zeros and the sign of zero", ["0", "00", "-0", "0.00", "0/7"]),
    ("singular and plural", ["5 hours", "5 hour", "5", r"5 \text{ hours}"]),
    ("relations", [r"x \le 3", r"x\leq3", "x \u2264 3"]),
    ("not equal", [r"x \ne 0", r"x\neq 0", "x\u22600"]),
    ("a root in a fraction", [r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt{3}}2"]),
    ("a huge exponent is text", ["1e999999999", "1e999999999"]),
    ("a tower is text", ["9^9^9^9", "9 ^ 9 ^ 9 ^ 9"]),
    ("no number divided by zero", ["1/0", r"1 / 0"]),
    ("a matrix is text", [
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"]),
    ("thin blanks between thousands", [
        r"12\,500.75", "12,500.75", r"12{,}500.75", "12\u202f500.75", r"\$12\;500.75"]),
    ("thin blanks in a point", [r"(12\,500, 3)", "(12500,3)"]),
    ("a part of pi", [
        r"\frac{\pi}{4}", r"\pi/4", "pi/4", "\u03c0/4", r"$\dfrac{\pi}4$", r"x=\frac{\pi}{4}"]),
    ("a negative quotient", [r"-\frac{\sqrt{3}}{2}", r"\frac{-\sqrt{3}}{2}", r"-\sqrt3/2"]),
    ("a quotient of sums", [r"\frac{x+1}{2x}", "(x+1)/(2x)"]),
    ("a quotient in a sum", [r"1+\frac{x^2}{3}", "1+x^2/3"]),
    ("factors", [r"2\cdot\pi", "2*pi", "2pi", r"2\pi"]),
    ("roots in plain text", ["\u221a17", "sqrt(17)", r"\sqrt{17}", "\u221a(17)"]),
    ("a root of another degree", [r"\sqrt[3]2", r"\sqrt[3]{2}"]),
    ("halves of one character", ["2\u00bd", "2.5", r"2\frac12"]),
    ("parts of one character", ["\u00bc, \u00be, \u2153, \u2154", "1/4, 3/4, 1/3, 2/3"]),
    ("signs of one character", ["x \u2265 3\u00b7\u03c0", r"x\ge 3\pi"]),
    ("sets and dots of one character", ["x\u2208A\u2229B\u2026\u00b12", r"x \in A \cap B \ldots\pm 2"]),
    ("a dash for a minus", ["\u20133", "-3"]),
    ("narrow blanks", ["12\u00a0500\u2009000", "12500000"]),
    ("raised digits", ["10\u207b\u00b3", "0.001"]),
    ("wide characters", ["\uff11\uff19", "19"]),
    ("a factorial", ["7!", "5040"]),
    ("all the digits of a float", ["0.142857142857143", "1/7"]),
    ("a plus before infinity", [r"[2,+\infty)", r"[2,\infty)", "[2, \u221e)"]),
    ("brackets of a size", [r"\bigl(1,2\bigr]", "(1,2]"]),
    ("unions", [r"[0,1] \cup [2,3]", "[0,1]\u222a[2,3]"]),
    ("nothing", [r"\varnothing", r"\emptyset", "\u2205", r"\{ \}"]),
    ("numbers of all kinds", [r"\mathbb R", "\u211d"]),
    ("a list in another order", ["1, 3", "3, 1", "3 and 1", "$1$ and $3$", r"\(1\), \(3\)"]),
    ("a set in another order", [r"\{1,2\}", r"\{2, 1.0\}"]),
    ("points in another order", ["(1,2), (3,4)", "(3,4), (1,2)"]),
    ("equations in another order", ["x=1, y=2", "y=2, x=1"]),
    ("one label for all", ["x=5, x=-5", "-5, 5", "x = 5, -5"]),
    ("a label of a point", ["(x,y)=(1,2)", "(1,2)"]),
    ("a label of an interval", [r"x \in [1,2]", "[1,2]"]),
    ("a complex number", ["z=3+4i", "3+4i"]),
    ("units of two letters stick to the number", ["5cm", "5 cm", "5"]),
    ("plurals in -es", ["4 inches", "4 inch", "4"]),
    ("square and per", ["20 square feet", "20"]),
    ("an option with its text", ["B", "(B) 14", "B.", "B)"]),
    ("an option with its text, dressed", [r"\textbf{(B)}\ 14", "B. 14", "B) 14", "B: 14", "B"]),
    ("words in capitals", ["Yes", "yes", "YES", r"\text{Yes}"]),
    ("fences of Markdown", ["**19**", "`19`", "19", "{19}"]),
    ("matrices in other brackets", [
        r"\begin{pmatrix}0.5&1\\2&3\end{pmatrix}", r"\begin{bmatrix}\frac12 & 1\\ 2 & 3\end{bmatrix}"]),
    ("less or equal", ["x<=3", r"x\leqslant 3", r"x \le 3"]),
]
# Words that change the number in front of them.
COUNTING = """thirds quarters sevenths twentieths hundredths half lakh crore dozen score gross pairs
    grand hundred Million fold squared cubed factorial repeating binary plus below negative theta
    more pi mod per xyz sevens twenties greater older grosses googol arab fourty hundreth multiples trios
    peta pico opposite complement raised ago past infinite undefined imaginary excluded cosine arctan
    zeta exponent radical wan naughts noughts nil quad ratio proportion decimal dot carry each wrong false true
    couple quartets hexadecimals""".split()
# (what it guards, an answer, another)
UNEQUAL = [
    *[(f"5 {word}", f"5 {word}", "5") for word in COUNTING],
    ("a phrase", "5 less than twelve", "5"),
    ("a phrase, modular", "6 mod 11", "6"),
    ("a phrase with a unit", "5 billion dollars", "5"),
    ("a product of variables", "5 xy", "5"),
    ("a letter for a thousand", "5k", "5"),
    ("thin blanks before two digits", r"12\,50", "1250"),
    ("a decimal comma", "0,5", "0.5"),
    ("a point is no decimal", "(1,2)", "1.2"),
    ("two signs", "+-5", "-5"),
    ("two signs, equal", "--5", "5"),
    ("about", "~5", "5"),
    ("both signs", r"\pm 5", "5"),
    ("a product is no mixed number", r"2\cdot\frac12", r"2\frac12"),
    ("a quotient of more", r"\frac{\pi}{4}x", r"\pi/4x"),
    ("a quotient in a function", r"\sin\frac{\pi}{4}", r"\sin\pi/4"),
    ("a sum over a number", r"\frac{x+1}{2}", "x+1/2"),
    ("a product below", r"\frac{1}{2x}", "1/2x"),
    ("LaTeX takes one digit", r"\sqrt17", r"\sqrt{17}"),
    ("a power of a root", r"\sqrt{2}^{3}", r"\sqrt{23}"),
    ("a factor e", "10*e3", "10e3"),
    ("a larger factorial", r"\frac{1}{900!}", r"\frac{1}{901!}"),
    ("a rounded seventh", "0.14285714285714", "1/7"),
    ("fourteen digits and a wrong one", "0.142857142857152", "1/7"),
    ("a decimal is exact", "0.500000000000001", "1/2"),
    ("a decimal and a decimal fraction", "0.500000000000000", "5000000000000001/10000000000000000"),
    ("a set and a list", r"\{3,1\}", "1, 3"),
    ("a time", "11:30", "11.30"),
    ("a ratio", "3:4", "3/4"),
    ("either", "5 or 6", "5, 6"),
    ("one of two", "x=5 or x=-5", "5"),
    ("one more of the same", r"\{3,4\}", r"\{3,4,4\}"),
    ("points change their parts", "(1,2), (3,4)", "(1,4), (3,2)"),
    ("sets change their parts", r"\{1,2\},\{3,4\},\{5,6\}", r"\{1,4\},\{5,2\},\{3,6\}"),
    ("a sequence", r"1,2,3,\dots", r"3,2,1,\dots"),
    ("thousands are no list", "1 and 234", "1,234"),
    ("labels change", "x=1, y=2", "2, 1"),
    ("a label for one and for all", "x=1, 2", "x=1, y=2"),
    ("labels of intervals", "A=(0,2)", "B=(0,2)"),
    ("two labels", "x=y=5", "x=5"),
    ("a label and another with a unit", "y=5", "x=5 cm"),
    ("a function of x", "y=(x+1)(x-2)", "(x+1)(x-2)"),
    ("two options", "(A) and (B)", "A"),
    ("one of two options", "(A) or (B)", "A"),
    ("two options with their texts", "A. 3 B. 4", "A"),
    ("two letters", "C. D", "C"),
    ("a product of options", "A.B", "A"),
    ("another text", "(C) 14", "(C) 15"),
    ("no letter", "(C) 14", "14"),
    ("segments", "AB", "ab"),
    ("Greek", r"\Delta", r"\delta"),
    ("a row and a column", r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("a determinant", r"\begin{vmatrix}1&2\end{vmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    ("a comma in a list is no thousands comma", "1,2", "12"),
    ("the last group has two digits", "1,234,56", "123456"),
    ("the last group has two digits, again", "1,234,56", "1234,56"),
    ("the last group has four digits", "1,2345", "12345"),
    ("a zero before the comma", "0,123", "123"),
    ("no group before the first comma", ",000", "000"),
    ("a blank after the comma: a list", "1, 234", "1234"),
    ("four digits before the comma", "1234,567", "1234567"),
    ("no thousands commas in a point", "(1,000)", "(1000)"),
    ("a rounded third", "0.333", "1/3"),
    ("dots are more than a full stop", "0.333...", "0.333"),
    ("floats would agree", "0.1", "0.10000000000000000001"),
    ("past 2 ** 53", "9007199254740993", "9007199254740992"),
    ("a part of a longer fraction", "1/2", "1/2/3"),
    ("a fraction of a fraction", r"\frac{1}{2}/3", "1/6"),
    ("digits behind a fraction", r"\frac{1}{2}3", "1/23"),
    ("a mixed number is not glued", "3 1/2", "31/2"),
    ("a mixed number is not a product", r"3\frac{1}{2}", "3/2"),
    ("a mixed number has whole parts", "3 1/2.5", "3.4"),
    ("a label in the numerator", r"\frac{x=1}{2}", "1/2"),
    ("a unit in the denominator", r"\frac{1}{2 m}", "0.5 m"),
    ("an improper part", "3 4/2", "5"),
    ("a difference is no mixed number", "3-1/2", "5/2"),
    ("blanks between digits", "1 2", "12"),
    ("currency between digits", "1$2", "12"),
    ("percent between digits", "1%2", "12"),
    ("percent is not a ratio", r"50\%", "0.5"),
    ("another sign", "-5", "5"),
    ("another option", "(B)", "(C)"),
    ("a variable is no option", "b", "B"),
    ("an option is no variable", "(b)", "b"),
    ("an open interval", "(1,2)", "[1,2]"),
    ("half open", "[1,2)", "[1,2]"),
    ("a point is no list", "(1,2)", "1,2"),
    ("another length", "(1,2)", "(1,2,3)"),
    ("a list with one more", "1,2", "1,2,3"),
    ("one entry differs", "(1,2)", r"(1,\frac{5}{2})"),
    ("another label", "x=5", "y=5"),
    ("an equation", "x=5", "x=6"),
    ("a label before more than a number", "x=5y", "5y"),
    ("another unit", r"5 \text{ cm}", r"5 \text{ m}"),
    ("money is no percentage", r"\$50", r"50\%"),
    ("a variable glued to the number", "5x", "5"),
    ("a variable after a blank", "5 x", "5"),
    ("words that change the number", "5 million", "5"),
    ("words that change the number, in text", r"5 \text{ thousand}", "5"),
    ("words that change the number, capital", "5 Million", "5"),
    ("words that change the number, in the plural", "5 millions", "5"),
    ("parts", "5 thousandths", "5"),
    ("halves", "3 halves", "3"),
    ("a dozen", "12 Dozen", "12"),
    ("2 Pi", "2 Pi", "2"),
    ("a sum in words", "5 plus two", "5"),
    ("at least, capital", "5 Or more", "5"),
    ("metres and milliseconds", "5 m", "5 ms"),
    ("less and less or equal", "x < 3", r"x \le 3"),
    ("\\left is no relation", r"\left( 1 \right)", r"\leq"),
    ("two answers", "5 or 6", "5"),
    ("at least", "5 or more", "5"),
    ("a number inside a sentence", "about 5", "5"),
    ("pi is not dropped", r"2\pi", "2"),
    ("pi is exact", r"\pi", "3.14159"),
    ("a root is not dropped", r"\sqrt{2}", "2"),
    ("a longer root", r"\sqrt{2}3", r"\sqrt{23}"),
    ("no arithmetic: powers", "2^{10}", "1024"),
    ("no arithmetic: sums", "1+1", "2"),
    ("a digit behind the exponent", "10^{3}5", "10^{35}"),
    ("a fraction times a power", r"1/2\times10^3", "0.0005"),
    ("another index", "101_2", "101_3"),
    ("an arrow is no \\left", r"\leftarrow", "arrow"),
    ("not a number", "nan", "0"),
    ("infinity is a word", "inf", "infinity"),
    ("an underscore is no digit separator", "1_000", "1000"),
    ("a digit of another alphabet", "\u0663", "3"),
    ("division by zero", "1/0", "2/0"),
    ("hexadecimal", "0x10", "16"),
    ("code", "__import__('os')", "0"),
    ("a power beyond the limit", "1e1000", "1" + "0" * 1000),
    ("another huge exponent", "1e999999999", "1e999999998"),
    ("another tower", "9^9^9^9", "9^9^9"),
    ("a unit alone", r"\%", "0"),
]


def equal(left, right):
    """The answer, having checked that it does not depend on which of the two is the truth."""
    forward, backward = answers_equal(left.encode(), right), answers_equal(right.encode(), left)
    assert forward is backward, (left, right)
    return forward


PAIRS = [(name, *pair) for name, answers in EQUAL for pair in itertools.combinations(answers, 2)]


@pytest.mark.parametrize("name, left, right", PAIRS, ids=[ascii(pair[1:]) for pair in PAIRS])
def test_the_same_answer_in_another_notation_is_equal(name, left, right):
    assert equal(left, right) and equal(left, left) and equal(right, right)


@pytest.mark.parametrize("name, left, right", UNEQUAL, ids=[pair[0] for pair in UNEQUAL])
def test_answers_that_only_look_alike_are_unequal(name, left, right):
    assert not equal(left, right)
    assert equal(left, left) and equal(right, right)


@pytest.mark.parametrize("prediction, truth, same", [
    (None, "5", False),
    (b"", "5", False),
    (b"", "", False),  # an empty answer is no answer, even to an empty truth
    (b" \n", " ", False),
    (rb"\boxed{}", r"\boxed{}", False),
    (b"$$", "$", False),
    (b"5\xff", "5", False),
    (b"\xff5 cm", "5", False),
    (b"5 \\text{\xff}", "5", False),
    (b"\xff", "\ufffd", False),  # not replaced by a question mark that the truth may hold
    (b"caf\xe9", b"caf\xe9".decode("utf-8", "surrogateescape"), True),
])
def test_nothing_equals_nothing_and_broken_text_only_itself(prediction, truth, same):
    assert answers_equal(prediction, truth) is same


def notations(value):
    """All exact ways to write a Fraction, from its own numerator and denominator."""
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    forms = [f"{sign}{top}/{bottom}", f"{sign}{3 * top} / {3 * bottom}",
             rf"{sign}\frac{{{top}}}{{{bottom}}}", rf"$\dfrac{{{sign}{top}}}{{{bottom}}}$",
             rf"x = {sign}\tfrac{{{top}}}{{{bottom}}}", rf"{sign}\${top}/{bottom}",
             rf"\boxed{{{sign}{top}/{bottom}}}", f"{sign}{top}/{bottom} cm"]
    if top < 10 and bottom < 10:
        forms.append(rf"{sign}\frac{top}{bottom}" if bottom > 1 else f"{sign}{top}.")
    if top > bottom > 1:
        forms += [f"{sign}{top // bottom} {top % bottom}/{bottom}",
                  rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}"]
    if 10 ** 6 % bottom == 0:  # six decimals are exact
        millionths = top * 10 ** 6 // bottom
        whole, rest = divmod(millionths, 10 ** 6)
        forms += [f"{sign}{whole}.{rest:06}", f"{sign}{whole:,}.{rest:06}",
                  f"{sign}{whole}.{rest:06}000", f"{sign}{millionths}e-6",
                  rf"{sign}{millionths}.0 \times 10^{{-6}}"]
    if bottom == 1:
        forms += [f"{sign}{top}", f"{sign}{top:,}", rf"{sign}{top}\%", f"{sign or '+'}{top}"]
    return forms


def test_random_fractions_are_equal_in_every_notation_and_to_no_other_fraction():
    rng = random.Random(0)
    before = Fraction(1, 3)
    for _ in range(80):
        scale = rng.choice([9, 60, 10 ** 4, 10 ** 12])
        bottom = rng.choice([1, 1, 2, 3, 7, 8, 40, 64, rng.randint(1, scale)])
        value = Fraction(rng.randint(-scale, scale), bottom)
        near = value + Fraction(rng.choice([-1, 1]), 10 ** rng.randint(0, 40))
        plain = f"{value.numerator}/{value.denominator}"
        for form in notations(value):
            assert equal(form, plain), (form, plain)
            for other in {near, before, -value, value + 1} - {value}:
                assert not equal(form, f"{other.numerator}/{other.denominator}"), (form, other)
        before = value


def test_random_bytes_never_raise():
    rng = random.Random(0)
    pieces = rb"""0 1 12 7 , , . - + / e E9 ^ { } ( ) [ ] $ % _ = x * cm 1,000 /0 inf nan 10^{ \ \,
                  \{ \} \% \left \right \frac \sqrt \text{ \boxed{ \times ^\circ""".split()
    pieces += [b" ", b"\n", b"\x00", b"\xff", b"\xe2\x88\x92", b"9" * 600, b" miles"]
    empty = 0
    for _ in range(4000):
        one, other = (b"".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(2))
        text = other.decode("utf-8", "surrogateescape")
        for prediction in one, rng.randbytes(12):
            assert answers_equal(prediction, text) in (True, False)
        empty += not answers_equal(other, text)
    # Only what consists of layout, such as `$` and `\,`, is not even equal to itself.
    assert 0 < empty < 200


NASTY = r"""( { [ $ . , 1 1, 1,111 1/ - e1 9^ ^1 ab/ = x= ~ (1) \ \! \{ \frac \frac{ \frac1 \text{
             \boxed{ \sqrt ^{\circ} 10^{ *10^{9} −""".split()
NASTY += r"\frac{1}{2}= ⁻ √ 1! \{1\}, \in x=1, 1\, A.\pi $a $ ** \begin{pmatrix}".split()
NASTY += [" and ", "A. B ", "ab ", "5 cm, ", "a per ", " ", "1 ", "a ", "5 ab", "\\ ", "\\text "]


@pytest.mark.parametrize("piece", NASTY, ids=ascii)
def test_long_hostile_answers_are_read_in_linear_time(piece):
    for head in ["", "x=$1"]:
        text = head + (piece * 50_000)[:50_000]
        start = time.process_time()
        assert not answers_equal(text.encode(), text + "7")
        assert time.process_time() - start < 1  # usual: 0.1; quadratic: a minute


HUGE = [
    "9^9^9^9", "9^{9^{9^9}}", "1e999999999", "1e-999999999", "10^{999999999}", "10^99999999999",
    "9" * 10_000, "0." + "3" * 10_000, "1/" + "7" * 10_000, "1e" + "9" * 10_000,
    r"9.9\times10^{123456789}", "1e-999", "9" * 490 + "e999",
]


@pytest.mark.parametrize("text", HUGE, ids=[text[:20] for text in HUGE])
def test_a_huge_number_is_read_at_once_as_text(text):
    start = time.process_time()
    assert answers_equal(text.encode(), text) and not answers_equal(text.encode(), "1e999")
    assert not answers_equal(text.encode(), "0")
    assert time.process_time() - start < 0.2
