"""Whether code from a repository may run: only if the caller of this very call allows it.

    the wish          `trust_remote_code` in run.yaml, base.json, zofo.json or study.yaml, code that
                      a model's folder names, and a kernel repository in `attn_implementation`
    the permission    the argument `trust_remote_code` of this call, or its option on the command

Anyone can write a file, so a file can only wish. Whatever reads a wish from a file passes it to
`require_trust` before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from zofo.errors import UserError, shown

HOW_TO_ALLOW: Final = (
    "no file can allow that: pass trust_remote_code=True (on the command line "
    "model.trust_remote_code=true or --trust-remote-code) if you trust its authors"
)


def names_kernel(attention: str | None) -> bool:
    """Whether an attention implementation names a repository of kernels, such as org/kernel."""
    return "/" in (attention or "")


def require_trust(
    owner: object,
    name: str,
    *,
    wishes_code: bool,
    attention: str | None = None,
    is_allowed: bool,
) -> None:
    """Refuse what a file wishes, unless the caller allows it.

    Args:
        owner: the file or folder that wishes it, for the message.
        name: the model.
        wishes_code: whether it wishes to run code from the model's repository.
        attention: the attention implementation that it names.
        is_allowed: whether the caller of this very call allows code from repositories.

    Raises:
        UserError: if it wishes code and that is not allowed.
    """
    if is_allowed:
        return
    if wishes_code:
        raise UserError(f"{owner} needs code from the repository of {name}, and {HOW_TO_ALLOW}")
    if names_kernel(attention):
        raise UserError(
            f"{owner} asks for kernels from the repository {shown(attention)}, and {HOW_TO_ALLOW}. "
            "Without them, choose model.attn_implementation=sdpa or eager"
        )


def check_kernels(values: Mapping[str, Any], name: str) -> None:
    """Refuse the content of a model's config.json if it names a repository of kernels.

    Raises:
        UserError: if it does, at any depth.
    """
    for attention in _attentions(values):
        require_trust(
            f"the config.json of {name}",
            name,
            wishes_code=False,
            attention=attention,
            is_allowed=False,
        )


def _attentions(value: Any, *, is_one: bool = False) -> Iterator[str]:
    """Every text under a key for the attention implementation."""
    if isinstance(value, str) and is_one:
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _attentions(inner, is_one=is_one or "attn_implementation" in str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _attentions(inner, is_one=is_one)
