"""`hatrack generate`."""

from __future__ import annotations

import sys
from typing import Annotated, cast

import typer

from hatrack_client._connection import DEFAULT_SERVER
from hatrack_client.client import Client, GenerationStream
from hatrack_client.commands._options import ApiKey, Server, Tls, TlsCa
from hatrack_client.types import Delta, Message, Sampling


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from; default: standard input.")] = None,
    adapter: Annotated[str, typer.Option(metavar="NAME[@VERSION]", help="Default: the base alone.")] = "",
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message; implies --chat.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to generate at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep that many of the likeliest tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this likely relative to the likeliest.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed samples alike.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this; may be repeated.")] = None,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """Generate text with an adapter, or with the base alone."""
    text = _standard_input() if prompt is None else prompt
    messages = _conversation(text, system) if chat or system is not None else None
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or None,
    }
    sampling = cast("Sampling", {name: value for name, value in options.items() if value is not None})
    prompt = text if messages is None else None
    with Client(server, api_key=api_key, tls=tls, tls_ca=tls_ca) as client:
        if stream:
            _print(client.stream(adapter, prompt=prompt, messages=messages, **sampling))
        else:
            typer.echo(client.generate(adapter, prompt=prompt, messages=messages, **sampling).text)


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise typer.BadParameter("give one, or pipe one in", param_hint="PROMPT")
    return sys.stdin.read()


def _conversation(text: str, system: str | None) -> list[Message]:
    before: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return [*before, {"role": "user", "content": text}]


def _print(stream: GenerationStream) -> None:
    # Left early, by Ctrl-C or a closed pipe, it cancels the call.
    with stream:
        for item in stream:
            if isinstance(item, Delta):
                typer.echo(item.text, nl=False)
        typer.echo()
