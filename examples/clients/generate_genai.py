"""A bundle in onnxruntime-genai, unchanged: greedy tokens as alloc-run's, told as they come.

pip install onnxruntime-genai      # of its own environment: it brings onnxruntime
python examples/clients/generate_genai.py bundle/ --prompt "The committee"
python examples/clients/generate_genai.py bundle/ --message "Hello"   # by its chat template
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import onnxruntime_genai as genai


def generated(model: genai.Model, ids: list[int], most: int) -> Iterator[int]:
    """Yield up to so many tokens after those of a prompt."""
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + most, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt")
    asked.add_argument("--message")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="print token ids instead")
    arguments = parser.parse_args()
    model = genai.Model(str(arguments.bundle))
    tokenizer = genai.Tokenizer(model)
    text = arguments.prompt
    if text is None:
        if not (arguments.bundle / "chat_template.jinja").is_file():
            parser.exit(1, f"{arguments.bundle} has no chat template: give a --prompt.\n")
        messages = json.dumps([{"role": "user", "content": arguments.message}])
        text = tokenizer.apply_chat_template(messages=messages, add_generation_prompt=True)
    ids = [int(each) for each in tokenizer.encode(text)]
    stream, made = tokenizer.create_stream(), []
    for token in generated(model, ids, arguments.max_new_tokens):
        made.append(token)
        if not arguments.json:
            print(stream.decode(token), end="", flush=True)
    print(json.dumps({"prompt_ids": ids, "ids": made}) if arguments.json else "")


if __name__ == "__main__":
    main()
