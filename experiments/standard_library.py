"""Text that every machine has: the docstrings of Python's own standard library, read from its source, nothing imported."""

import ast
import inspect
import json
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo", "ensurepip"}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def write(folder: Path, vocab_size: int = 2048, limit: int | None = None) -> tuple[Path, Path, Path]:
    """Question/answer pairs (a signature, its summary line), plain text (whole docstrings), and a BPE tokenizer trained on both.

    ``limit`` keeps only the first docstrings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs, texts = folder / "pairs.jsonl", folder / "docstrings.jsonl"
    rows = list(islice(docstrings(), limit))
    with pairs.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": f"{code}\n", "response": _summary(doc)}) + "\n" for code, doc in rows)
    with texts.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": f"{code}\n{doc}"}) + "\n" for code, doc in rows)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator((f"{code}\n{doc}" for code, doc in rows), vocab_size=vocab_size, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "tokenizer")
    return pairs, texts, folder / "tokenizer"


def docstrings() -> Iterator[tuple[str, str]]:
    """(``module: def name(arguments)``, docstring) of every documented function and class, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT & set(parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            doc = ast.get_docstring(node) if isinstance(node, Definition) else None
            if doc and len(doc) >= 20:
                yield f"{module}: {_signature(node)}", inspect.cleandoc(doc)


def _summary(doc: str) -> str:
    return " ".join(doc.split("\n\n")[0].split())


def _signature(node: ast.AST) -> str:
    assert isinstance(node, Definition)
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    return f"def {node.name}({ast.unparse(node.args)})"
