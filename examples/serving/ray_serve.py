"""Replicas of alloc-serve on Ray Serve, which starts more when more is asked.

    pip install '.[serve]' 'ray[serve]' openai
    python examples/serving/ray_serve.py bundle/ --least 2 --most 4
    python examples/serving/ray_serve.py bundle/ --least 2 --try 40    # ask it, and end

Each replica holds the model once and writes several answers at a time, as alloc-serve does. Ray
Serve chooses among the replicas, restarts those that die, and spreads them over the machines of a
cluster: there, `ray start` the machines first and give --address auto.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from openai import OpenAI
from ray import serve

ROWS = 8


def deployment(artifact: str, *, least: int, most: int) -> Any:
    """Return the application: at least and at most so many replicas of a server."""

    def build() -> Any:
        from alloc_moe.runtime import load
        from alloc_moe.runtime.serving.app import application
        from alloc_moe.runtime.serving.server import Limits, Server

        model = load(artifact, ep="cpu", threads=1, count_activations=True)
        app = application(Server(model, name="moe", limits=Limits(rows=ROWS)))
        own = serve.get_replica_context().replica_id.unique_id

        async def told(scope: Any, receive: Any, send: Any) -> None:
            """Say in every answer's head which replica it came from."""

            async def marked(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-replica", own.encode())]
                await send(message)

            await app(scope, receive, marked)

        return told

    replicas = serve.deployment(
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=4 * ROWS,
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": ROWS,
        },
    )
    return replicas(serve.ingress(build)()).bind()


def ask(url: str, count: int) -> Counter[str]:
    """Ask so many times by 16 clients; return how many answers each replica gave.

    Raises:
        ValueError: Two answers to one question differ.
    """
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        def answer(number: int) -> tuple[str, str, str]:
            prompt = f"The committee of {number % 8}"
            raw = client.completions.with_raw_response.create(
                model="moe", prompt=prompt, temperature=0, max_tokens=16
            )
            return prompt, raw.parse().choices[0].text, raw.headers["x-replica"]

        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(answer, range(count)))
    if len({(prompt, text) for prompt, text, _ in found}) != len({p for p, _, _ in found}):
        raise ValueError("Replicas disagree: one question got different answers.")
    return Counter(replica for _, _, replica in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--least", type=int, default=1)
    parser.add_argument("--most", type=int, default=4)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--address", help="of a Ray cluster; by default a new one, here")
    parser.add_argument("--try", type=int, dest="count", metavar="N")
    arguments = parser.parse_args()
    most = max(arguments.least, arguments.most)
    if arguments.address:
        ray.init(address=arguments.address)
    else:
        ray.init(num_cpus=most, include_dashboard=False, object_store_memory=80 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    artifact = str(Path(arguments.artifact).resolve())
    serve.run(deployment(artifact, least=arguments.least, most=most))
    url = f"http://127.0.0.1:{arguments.port}"
    try:
        if arguments.count:
            answers = ask(url, arguments.count)
            counts = ", ".join(map(str, answers.values()))
            print(f"{answers.total()} answers from {len(answers)} replicas: {counts}")
        while not arguments.count:
            time.sleep(1)
    except KeyboardInterrupt:
        print("Stopped.")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
