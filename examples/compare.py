"""Asks the base and several adapters the same question, all in the same batch.

HATRACK_SERVER and HATRACK_API_KEY name the server and the key, as they do for the `hatrack` command.

    python examples/compare.py "My order is late" support-tone greetings
"""

import asyncio
import os
import sys

from hatrack_client import AsyncClient


async def main(prompt: str, adapters: list[str]) -> None:
    """Prints each one's answer, and which version gave it."""
    server = os.environ.get("HATRACK_SERVER", "127.0.0.1:50051")
    async with AsyncClient(server, api_key=os.environ.get("HATRACK_API_KEY")) as client:
        answers = await asyncio.gather(
            *(client.generate(adapter, prompt=prompt, max_tokens=60) for adapter in ["", *adapters])
        )
    for answer in answers:
        name = f"{answer.adapter}@{answer.version}" if answer.adapter else "base"
        sys.stdout.write(f"{name}: {answer.text.strip()}\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
