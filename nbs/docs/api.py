"""API pages from docments: the comments that stand beside parameters, fields and results in the exported modules.

Modules are read, not imported: types, defaults and comments appear as they are written, and building the pages needs no PyTorch.
"""
import ast
import io
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


class Row(NamedTuple):
    "A parameter, a field or a result."
    name: str
    type: str
    default: str
    comment: str


class Source:
    "The text of one exported module, its comments by line, its definitions by name."
    def __init__(self, path: Path, modules: dict):
        self.name, self.text, self.modules = path.stem, path.read_text(encoding="utf-8"), modules
        self.tree, self.lines = ast.parse(self.text), self.text.encode().split(b"\n")
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        self.comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        self.cells = [(i, *m.groups()) for i, line in enumerate(self.text.split("\n"), 1) if (m := re.match(r"# %% \S*?(\w+)\.ipynb #(\w+)", line))]
        self.origin = {name.name: node.module for node in self.tree.body if isinstance(node, ast.ImportFrom) and node.level for name in node.names}
        self.public, self.defined = [], {}
        for node in self.tree.body:
            if isinstance(node, (*FUNCTION, ast.ClassDef)): self.defined[node.name] = node
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
                self.defined.update(dict.fromkeys(names, node))
                if names == ["__all__"]: self.public = ast.literal_eval(node.value)

    @property
    def notebook(self): # stem of the notebook that exports it
        return self.cells[0][1]

    def cell(self, node): # id of the cell that a definition stands in
        return [id for line, _, id in self.cells if line <= node.lineno][-1]

    def written(self, node): # source text of an expression, '' for none
        if node is None: return ""
        lines = self.lines[node.lineno - 1:node.end_lineno]
        lines[-1] = lines[-1][:node.end_col_offset] # counted in bytes
        lines[0] = lines[0][node.col_offset:]
        return b"\n".join(lines).decode()


def read_package(folder):
    "Module name → Source; each knows the others."
    modules = {}
    modules.update({path.stem: Source(path, modules) for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")})
    return modules


def parameter_rows(source, function):
    "Docments of a function's parameters, without self; a comment belongs to the last parameter of its line, or to the result if that is there."
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = dict(zip(reversed(plain), reversed(a.defaults))) | dict(zip(a.kwonlyargs, a.kw_defaults))
    listed = [("", p) for p in plain] + [("*", a.vararg)] * bool(a.vararg) + [("", p) for p in a.kwonlyargs] + [("**", a.kwarg)] * bool(a.kwarg)
    last = {p.lineno: p for _, p in listed}
    rows = []
    for stars, p in listed:
        mine = last[p.lineno] is p and p.lineno != function.lineno
        rows.append(Row(stars + p.arg, source.written(p.annotation), source.written(defaults.get(p)), source.comments.get(p.lineno, "") if mine else ""))
    return [row for row in rows if row.name not in ("self", "cls", "ctx")]


def result_row(source, function):
    "Docment of what a function returns, or None; on a one-line signature it is the comment after the colon."
    line = function.returns.lineno if function.returns else function.lineno
    row = Row("returns", source.written(function.returns), "", source.comments.get(line, ""))
    return row if row.type or row.comment else None


def field_rows(source, cls):
    "Docments of the fields of a named tuple or dataclass; `option(default, meaning)` carries its own."
    rows = []
    for node in cls.body:
        if not isinstance(node, ast.AnnAssign): continue
        default, comment = node.value, source.comments.get(node.end_lineno, "")
        if isinstance(default, ast.Call) and source.written(default.func) == "option":
            default, comment = default.args[0], ast.literal_eval(default.args[1])
        rows.append(Row(node.target.id, source.written(node.annotation), source.written(default), comment))
    return rows


def in_cell(text):
    "Markdown text that may stand in a table; code spans keep what they say."
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def prose(text):
    "A comment as Markdown: characters that Markdown would read as markup are shown as they are, code spans stay code."
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else re.sub(r"([*_$<>\[\]{}^~])", r"\\\1", part) for i, part in enumerate(parts))


def code(text):
    "An inline code span, '' for nothing."
    return f"`{text}`" if text else ""


def type_of(source, annotation):
    "A type as written; one of our classes as a link."
    full = linked(source, annotation)
    return f"{{py:class}}`~{full}`" if re.fullmatch(r"prvr_nb\.\w+\.\w+", full) else code(annotation)


def table(source, rows, head="parameter"):
    "A Markdown table of docments; a column that says nothing is left out."
    columns = [(head, [code(r.name) for r in rows]), ("type", [type_of(source, r.type) for r in rows]),
               ("default", [code(r.default) for r in rows]), ("meaning", [prose(r.comment) for r in rows])]
    columns = [(title, cells) for title, cells in columns if any(cells)]
    lines = [[title for title, _ in columns], ["---"] * len(columns), *zip(*(cells for _, cells in columns))]
    return "\n".join("| " + " | ".join(map(in_cell, line)) + " |" for line in lines)


def linked(source, annotation):
    "A type with the full names of our classes, so that Sphinx links them."
    def full(match):
        module = source.origin.get(match[0], source.name)
        return f"prvr_nb.{module}.{match[0]}" if isinstance(source.modules[module].defined.get(match[0]), ast.ClassDef) else match[0]
    return re.sub(r"(?<![\w.])[A-Z]\w+", full, annotation)


def signature(source, rows, result):
    "The signature as Sphinx' Python domain reads it."
    args = [r.name + (f": {linked(source, r.type)}" if r.type else "") + (f" = {r.default}" if r.default else "") for r in rows]
    return f"({', '.join(args)})" + (f" -> {linked(source, result.type)}" if result and result.type else "")


def block(kind, title, *body, options=(), fence=":::"):
    "One directive of Sphinx' Python domain."
    return "\n".join([f"{fence}{{py:{kind}}} {title}", *options, "", "\n\n".join(part for part in body if part), fence, ""])


def doc_of(node):
    "One-line docstring, or ''."
    return prose(ast.get_docstring(node) or "")


def function_block(source, node, where="", kind="function", options=(), fence=":::"):
    "Signature, docstring, parameters and result of a function or method."
    rows, result = parameter_rows(source, node), result_row(source, node)
    told = any(r.comment for r in rows) # then the table has the types, and the signature is short
    returned = result and result.comment and f"*Returns* {type_of(source, result.type)} — {prose(result.comment)}".replace("  ", " ")
    shown = [r._replace(type="") for r in rows] if told else rows
    return block(kind, node.name + signature(source, shown, result), f"{doc_of(node)} {where}", table(source, rows) if told else "", returned, options=options, fence=fence)


def method_blocks(source, cls):
    "Public methods and properties of a class; `__init__` is the class' own signature."
    for node in cls.body:
        if not isinstance(node, FUNCTION) or (node.name.startswith("_") and node.name != "__call__"): continue
        marks = {source.written(d) for d in node.decorator_list}
        if marks & {"property", "cached_property"}:
            kind = [f":type: {linked(source, source.written(node.returns))}"] if node.returns else []
            comment = source.comments.get(node.returns.lineno if node.returns else node.lineno, "")
            yield block("property", node.name, doc_of(node) or prose(comment), options=kind)
        else: yield function_block(source, node, kind="method", options=[f":{m}:" for m in ("staticmethod", "classmethod") if m in marks])


def class_block(source, node, where):
    "Signature, docstring, fields or parameters, and methods of a class."
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    rows, head = (parameter_rows(source, init), "parameter") if init else (field_rows(source, node), "field")
    bases = ", ".join(source.written(base) for base in node.bases)
    kind = "exception" if bases.endswith(("Error", "Exception")) else "class"
    title = node.name + (signature(source, [r._replace(type="") for r in rows], None) if rows and len(rows) <= 8 else "")
    derived = f"A {code(bases)}." if bases else ""
    return block(kind, title, f"{doc_of(node)} {derived} {where}", table(source, rows, head) if rows else "", *method_blocks(source, node), fence="::::")


def data_block(source, node, name, where, longest=14):
    "Value and comment of a constant; a long value is cut."
    lines = source.written(node.value).split("\n")
    shown = "\n".join(lines[:longest] + ["…"] * (len(lines) > longest))
    tuple_of_names = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name)
    return block("data", name, f"{prose(source.comments.get(node.end_lineno, ''))} {where}", "" if tuple_of_names else f"```python\n{shown}\n```")


def name_block(source, name, where):
    "The entry of one public name."
    node = source.defined[name]
    if isinstance(node, ast.ClassDef): return class_block(source, node, where)
    if isinstance(node, FUNCTION): return function_block(source, node, where)
    return data_block(source, node, name, where)


def module_page(source, title, section_of):
    "The page of a module: its public names in the order of the notebook, under the headings they stand under there."
    lines = [f"# {source.name}", f"```{{py:module}} prvr_nb.{source.name}\n```",
             f"Exported from notebook [{title}](../{source.notebook}.ipynb). Import as `from prvr_nb.{source.name} import …`."]
    last = None
    for name in sorted(source.public, key=lambda name: source.defined[name].lineno):
        cell = source.cell(source.defined[name])
        section = section_of.get(cell, "")
        if section != last: lines.append(f"## {section}" if section else "")
        last = section
        lines.append(name_block(source, name, f"[In the notebook](#code-{cell})."))
    return "\n\n".join(lines) + "\n"
