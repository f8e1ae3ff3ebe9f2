"""LitServe's side of the `no_op` benchmark; its worker process imports this module again.

python -m benchmarks.litserve_peer --port PORT [--stream]
"""

import argparse

import litserve

from benchmarks.peers import ANSWER, EVENT, NAMES, NUM_TOKENS

# Without types: LitServe makes of those it finds what FastAPI then checks and documents.
# mypy: disable-error-code="no-untyped-def"


class NoOp(litserve.LitAPI):
    """Answers at once."""

    def setup(self, device):
        """There is no model."""

    def decode_request(self, request):
        return request["text"]

    def predict(self, text):
        return {**ANSWER, **NAMES}

    def encode_response(self, output):
        return output


class NoOpStream(NoOp):
    """Says tokens at once, each as an event."""

    def predict(self, text):
        for _ in range(NUM_TOKENS):
            yield EVENT

    def encode_response(self, output):
        yield from output


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--stream", action="store_true")
    arguments = parser.parse_args()
    kind = NoOpStream if arguments.stream else NoOp
    server = litserve.LitServer(
        kind(api_path="/predict", stream=arguments.stream),
        accelerator="cpu",
        workers_per_device=1,
        fast_queue=True,
        healthcheck_path="/readyz",
    )
    server.run(
        host="127.0.0.1",
        port=arguments.port,
        num_api_servers=1,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
