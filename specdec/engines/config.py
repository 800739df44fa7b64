"""The options of `specdec admit`, which its command line shows without loading a model library."""

from pydantic import Field

from specdec.common.config import Config


class AdmitConfig(Config):
    """The engine, and what it is asked."""

    engine: str = Field(
        description="engine to start, vllm or llama.cpp, or the URL of a server that runs, with /v1"
    )
    target: str | None = Field(None, description="folder or hub id of the target")
    prompts: str = Field("demo", description="sources of prompts as in a bench, commas between")
    num: int = Field(20, ge=1, description="prompts of each source")
    max_new_tokens: int = Field(64, ge=2, description="tokens of an answer")
    num_tokens: int = Field(5, ge=1, description="tokens drafted in a step")
    plain: bool = Field(True, description="also start the engine without the drafter")
