"""Rules that keep the code readable, checked on syntax trees: who imports whom, circles, sizes.

    python tests/test_house.py [FOLDER]      figures for this checkout or another one
"""
import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READING_PATH = ("reward.py", "sample.py", "model.py", "train_rpt.py", "kernels/")
COMMANDS = {"data/prepare.py", "data/filter.py", "data/warmstart.py", "data/toy.py"}
ENTRANCES = {"train_rpt", "train_ntp", "eval", "plot", "demo"}

# What a file or folder may import of our modules. paper/, bench/ and tests/ may import anything.
LAYERS = {
    "reward.py": [],
    "kernels": ["kernels"],
    "plumbing": ["kernels", "plumbing"],
    "model.py": ["kernels", "plumbing.hf", "plumbing.rope"],
    "sample.py": ["kernels", "plumbing"],
    "data": ["data", "reward", "plumbing"],
    "objectives": ["objectives", "data", "reward", "kernels", "plumbing", "sample"],
    "train_rpt.py": ["objectives", "data", "reward", "kernels", "plumbing", "sample", "model"],
    "train_ntp.py": ["objectives", "data", "reward", "kernels", "plumbing", "sample", "model"],
    "eval.py": ["objectives", "data", "reward", "kernels", "plumbing", "sample", "model"],
    "demo.py": ["plumbing"],
    "plot.py": ["plumbing"],
}
# Commands in data/, and sample.py under `if __name__ == "__main__"`, may import more.
COMMANDS_MAY = ["data", "reward", "plumbing", "model", "sample"]
MAIN_MAY = {"sample.py": ["data", "reward", "plumbing", "model"]}


class Checkout:
    """The lines and syntax trees of all Python files of a folder."""

    def __init__(self, root):
        root = Path(root)
        self.lines, self.trees = {}, {}
        for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
            name = path.relative_to(root).as_posix()
            text = path.read_text(encoding="utf-8")
            self.lines[name] = text.splitlines()
            self.trees[name] = ast.parse(text)
        self.source = [name for name in self.lines if not name.startswith("tests/")]
        self.path = [name for name in self.source if name.startswith(READING_PATH)]
        self.modules = {self.module_of(name): name for name in self.source}

    @staticmethod
    def module_of(name):
        return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def functions(self, name):
        """[(name, lines)] of all functions of a file."""
        return [(node.name, node.end_lineno - node.lineno + 1)
                for node in ast.walk(self.trees[name]) if isinstance(node, ast.FunctionDef)]

    def imports(self, name, of=None):
        """The set of our own modules that a file (or its node `of`) imports anywhere."""
        found = set()
        for node in ast.walk(of or self.trees[name]):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= whole & self.modules.keys() or {node.module}
        return found & self.modules.keys()

    def circles(self):
        """Groups of files that import each other, directly or through others."""
        reach = {name: self.imports(name) for name in self.source}
        files = {name: {self.modules[module] for module in reach[name]} for name in self.source}
        for middle in self.source:
            for name in self.source:
                if middle in files[name]:
                    files[name] = files[name] | files[middle]
        return {frozenset(other for other in files[name] if name in files[other])
                for name in self.source if name in files[name]}

    def imported_names(self, name):
        return sum(len(node.names) for node in self.trees[name].body
                   if isinstance(node, (ast.Import, ast.ImportFrom)))

    def main_loop(self, name):
        """The longest `for` below `if __name__ == "__main__"`."""
        loops = [node for top in self.trees[name].body if isinstance(top, ast.If)
                 for node in ast.walk(top) if isinstance(node, ast.For)]
        return max(loops, key=lambda loop: loop.end_lineno - loop.lineno)

    def code_lines(self, name):
        """[(line, its number of tokens)] of lines with code: no comments, no docstrings."""
        text = "\n".join(self.lines[name]) + "\n"
        inside_docstrings = set()
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                inside_docstrings |= set(range(node.lineno, node.end_lineno + 1))
        skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
                   tokenize.DEDENT, tokenize.ENDMARKER)
        tokens = {}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in skipped and token.start[0] not in inside_docstrings:
                tokens[token.start[0]] = tokens.get(token.start[0], 0) + 1
        return [(self.lines[name][line - 1].strip(), count) for line, count in tokens.items()]

    def own_line_comments(self, name):
        return sum(line.strip().startswith("#") and not line.startswith("# --")
                   for line in self.lines[name])


HERE = Checkout(ROOT)
FREE = ("paper/", "bench/")


def belongs(module, allowed):
    return any(module == name or module.startswith(name + ".") for name in allowed)


@pytest.mark.parametrize("name", [name for name in HERE.source if not name.startswith(FREE)])
def test_a_file_imports_only_what_its_layer_may(name):
    folder = name.split("/")[0]
    allowed = LAYERS[name if name in LAYERS else folder]
    if name in COMMANDS:
        allowed = COMMANDS_MAY
    tree = HERE.trees[name]
    if name in MAIN_MAY:
        blocks = [node for node in tree.body if isinstance(node, ast.If)]
        inside = set().union(*(HERE.imports(name, of=block) for block in blocks))
        assert all(belongs(module, MAIN_MAY[name]) for module in inside)
        tree = ast.Module([node for node in tree.body if node not in blocks], [])
    imported = HERE.imports(name, of=tree)
    assert [module for module in imported if not belongs(module, allowed)] == []


def test_nobody_but_paper_and_bench_imports_a_file_that_is_run():
    for name in HERE.source:
        for module in HERE.imports(name):
            target = HERE.modules[module]
            runs = module in ENTRANCES or target in COMMANDS or target.startswith(FREE)
            assert not runs or name.startswith(FREE), f"{name} imports {target}"


def test_there_is_no_circle():
    assert HERE.circles() == set()


def test_nothing_that_is_read_from_a_disk_can_run_code():
    """Pickles can, and so could whatever is evaluated; safetensors, JSON and plain .npy cannot."""
    dangerous = re.compile(r"pickle|torch\.load|(?<![\w.])(eval|exec)\(|marshal|shelve|joblib|yaml|distcp|distributed"
                           r"\.checkpoint|distributed import checkpoint")
    found = [line for name in HERE.source for line in HERE.lines[name] if dangerous.search(line)]
    assert found == []


def test_the_loop_fits_on_a_screen_and_functions_are_short():
    loop = HERE.main_loop("train_rpt.py")
    assert loop.end_lineno - loop.lineno + 1 <= 40
    long = [(name, function) for name in HERE.path
            for function, lines in HERE.functions(name) if lines > 60]
    assert long == []


def test_no_line_is_longer_than_100_columns():
    long = [f"{name}:{i}" for name in HERE.source
            for i, line in enumerate(HERE.lines[name], start=1) if len(line) > 100]
    assert long == []


def test_every_text_that_is_read_or_written_names_its_encoding():
    missing = []
    for name in HERE.source:
        for node in ast.walk(HERE.trees[name]):
            if not isinstance(node, ast.Call):
                continue
            # run.open() is our own, os.open() opens bytes.
            called = ast.unparse(node.func).removeprefix("run.open").removeprefix("os.open")
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            modes = [ast.unparse(argument) for argument in node.args[:2]] + [given.get("mode", "")]
            opens = called.rpartition(".")[2] in ("open", "fdopen", "read_text", "write_text")
            is_text = opens and not any(re.fullmatch("'[rwax+]*b[+]?'", mode) for mode in modes)
            is_text |= called.startswith("subprocess.") and bool({"text", "universal_newlines"} & given.keys())
            if is_text and "encoding" not in given:
                missing.append(f"{name}:{node.lineno}")
    assert missing == []


def test_train_rpt_imports_at_most_25_names_and_8_files_are_on_top():
    assert HERE.imported_names("train_rpt.py") <= 25
    assert len([name for name in HERE.source if "/" not in name]) == 8


def figures(checkout):
    """{what: figure} of a checkout."""
    loop = checkout.main_loop("train_rpt.py")
    loop_names = {node.id for node in ast.walk(loop) if isinstance(node, ast.Name)}
    loop_names |= {node.attr for node in ast.walk(loop) if isinstance(node, ast.Attribute)}
    code = checkout.code_lines("train_rpt.py")
    functions = [(lines, f"{name} {function}") for name in checkout.path
                 for function, lines in checkout.functions(name)]
    return {
        "Python files at the top": len([name for name in checkout.source if "/" not in name]),
        "source lines": sum(len(checkout.lines[name]) for name in checkout.source),
        "lines of the reading path": sum(len(checkout.lines[name]) for name in checkout.path),
        "names that train_rpt.py imports": checkout.imported_names("train_rpt.py"),
        "lines of its main loop": loop.end_lineno - loop.lineno + 1,
        "names in its main loop": len(loop_names),
        "longest function of the path": "%d (%s)" % max(functions),
        "circles of imports": len(checkout.circles()),
        "characters a code line, train_rpt.py": round(sum(len(c) for c, _ in code) / len(code), 1),
        "tokens a code line, train_rpt.py": round(sum(n for _, n in code) / len(code), 1),
        "comment lines in sample.py": checkout.own_line_comments("sample.py"),
        "lines above 100 columns": sum(len(line) > 100 for name in checkout.source
                                       for line in checkout.lines[name]),
        "lines of tests": sum(len(lines) for name, lines in checkout.lines.items()
                              if name.startswith("tests/")),
    }


if __name__ == "__main__":
    for what, figure in figures(Checkout(sys.argv[1] if len(sys.argv) > 1 else ROOT)).items():
        print(f"{what:40} {figure}")
