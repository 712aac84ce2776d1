"""Read a notebook's parameters and plan its runs without running any of its code.

Cells tagged `parameters` hold literals, cells tagged `plan` literals and calls of the functions in
`study.plans`. Whatever else stands there is refused, so that a foreign notebook can be looked at.
"""

import ast
from types import GenericAlias, NoneType, SimpleNamespace

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
TYPE_NODES = (ast.Expression, ast.Name, ast.Load, ast.Subscript, ast.Tuple, ast.Constant)
PLAN_NODES = (
    ast.Module, ast.Assign, ast.Expr, ast.Call, ast.keyword, ast.Starred, ast.Name, ast.Load,
    ast.Store, ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Subscript, ast.Slice, ast.UnaryOp,
    ast.USub, ast.BinOp, ast.Add, ast.BitOr, ast.ListComp, ast.comprehension, ast.Attribute)


def type_of(annotation):
    """Return the type that an annotation names: str, list[int], ...; ValueError for all else."""
    kind = _evaluated(_parsed(annotation, "eval"), TYPE_NODES, TYPES)
    if not isinstance(kind, (type, GenericAlias, NoneType)):
        raise ValueError(f"{annotation[:60]!r} is no type")
    return kind


def literals(source):
    """Return {name: default} of a cell of parameters; ValueError for anything but literals."""
    values = {}
    for node in _parsed(source).body:
        target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue    # a text in place of a comment
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(target, ast.Name):
            raise ValueError(f"{ast.unparse(node)[:60]!r} is no parameter with a default")
        try:
            values[target.id] = ast.literal_eval(node.value)
        except (ValueError, TypeError, SyntaxError, AttributeError) as error:
            raise ValueError(f"the default of {target.id} is no literal") from error
    return values


def planned(source, values, functions):
    """Return the names that a cell of plans assigns, with what its calls of `functions` gave."""
    plans = SimpleNamespace(**functions)
    names = values | {"plans": plans, "ec": SimpleNamespace(plans=plans)}
    tree = _parsed(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Attribute):
            raise ValueError(f"calls {ast.unparse(node.func)[:60]}")
        if isinstance(node, ast.Attribute) and ast.unparse(node) != "ec.plans" and (
                ast.unparse(node.value) not in ("plans", "ec.plans")
                or node.attr not in functions):
            raise ValueError(f"uses {ast.unparse(node)[:60]}, which is no plan")
    return _evaluated(tree, PLAN_NODES, names)


def assigned(source):
    """Return the names that a cell assigns."""
    return {node.id for node in ast.walk(_parsed(source))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _parsed(source, mode="exec"):
    try:
        return ast.parse(source, mode=mode)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{source[:60]!r} cannot be read ({error})") from error


def _evaluated(tree, nodes, names):
    """Evaluate a tree of such nodes alone; the value, or of statements the names they assign."""
    for node in ast.walk(tree):
        if not isinstance(node, nodes):
            raise ValueError(f"{ast.unparse(node)[:60]!r} is not allowed here")
    known = dict(names)
    try:
        code = compile(tree, "notebook", "eval" if isinstance(tree, ast.Expression) else "exec")
        result = eval(code, {"__builtins__": {}}, known)
    except (TypeError, NameError, AttributeError, LookupError) as error:
        raise ValueError(str(error)) from error
    return result if isinstance(tree, ast.Expression) else known
