r"""Files of questions with exact answers: JSON lines with the fields of GSM8K, Omni-MATH, ...

    {"question" or "problem": text, "answer" or "solution": text}

The answer may end with #### 42 or contain \boxed{42}. A bad line is a ValueError with its number.
"""
import json

from data.corpus import JSON_NAMES, check_text, parse_json
from reward import extract_prediction


def read_questions(path):
    """-> [(question, exact answer)], both texts."""
    return read_lines(path, parse_question)


def read_solutions(path):
    """-> [(question, worked solution without its last #### line, exact answer)], all texts."""
    return read_lines(path, parse_solution)


def parse_question(record):
    name = "question" if record.get("question") is not None else "problem"
    question = check_text(field(record, "question", "problem"), f"'{name}'")
    return question, exact_answer(record)


def parse_solution(record):
    question = check_text(field(record, "question", "problem"), "'question'")
    solution = check_text(field(record, "solution", "answer"), "'solution'")
    thought = solution.rpartition("####")[0] or solution
    return question, thought.strip(), exact_answer(record)


def exact_answer(record):
    r"""What follows the last ####, else what is in the last \boxed{}, else all of it; stripped."""
    answer = text_field(field(record, "answer", "solution"), "the answer")
    _, mark, truth = answer.rpartition("####")
    if not mark:
        boxed = extract_prediction(b"</think>" + answer.encode())
        truth = answer if boxed is None else boxed.decode()
    return check_text(truth.strip(), "the exact answer")


def read_lines(path, parse):
    """JSONL -> [parse(object)]; blank lines are skipped."""
    parsed = []
    # As bytes, because text mode also breaks lines at a lone \r.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig").strip()
                if not text:
                    continue
                # Numbers with a point stay text, so that 0.50 is not turned into 0.5.
                record = parse_json(text, parse_float=str, parse_constant=refuse_constant)
                json.dumps(record, ensure_ascii=False).encode()  # refuses a lone surrogate
                if not isinstance(record, dict):
                    raise ValueError(f"expected an object, got {JSON_NAMES[type(record)]}")
                parsed.append(parse(record))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} line {number}: {error}") from None
    if not parsed:
        raise ValueError(f"{path}: no line in it")
    return parsed


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON; some tools write it for a missing value, or for the "
                     "word None")


def field(record, *names):
    """The first of these fields that a line has; null counts as missing."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise ValueError(f"expected an object with {' or '.join(map(repr, names))}, "
                     f"got one with {', '.join(map(repr, record)) or 'nothing'}")


def text_field(value, name):
    return check_text(str(value) if type(value) is int else value, name)
