"""The tokenizer of merged models, and which rows its tokens have, as a recipe says it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sensmerge.tasks.strict import Strict


class TokenOfModel(Strict):
    """The row of a model's token."""

    kind: Literal["model_token"] = Field(description="the row of a model's token")
    model: str = Field(description="base or the name of an expert")
    token: str | None = Field(None, description="the token")
    token_id: int | None = Field(None, ge=0, description="its row, instead of the token")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give token or token_id, and not both")
        return self


class Zeros(Strict):
    """A row of zeros."""

    kind: Literal["zero"] = Field(description="zeros")


class TokenSettings(Strict):
    """What models have for a token."""

    source: str | Annotated[TokenOfModel | Zeros, Field(discriminator="kind")] = Field(
        description="base or the name of an expert: its row of the token; {kind: model_token, model: …, token: …} (or "
        "token_id): the row of another token; {kind: zero}: zeros"
    )
    force: bool = Field(False, description="also in models that have the token")

    def models(self) -> list[str]:
        """Return the names of the models that it is taken from."""
        if isinstance(self.source, str):
            return [self.source]
        return [self.source.model] if isinstance(self.source, TokenOfModel) else []


class TokenizerSettings(Strict):
    """The tokenizer of merged models, its tokens, and the rows of embedding and head."""

    source: str = Field(
        "union",
        description="base or the name of an expert: take tokenizer, chat template, special tokens, end tokens and "
        "generation config from that model; union: take them from the base (or, if it has no chat template, the first "
        "expert with one) and add the others' tokens and end tokens",
    )
    pad_to_multiple_of: int | None = Field(
        None,
        ge=1,
        le=2**16,
        description="give embedding and head the least multiple of so many rows that has room for all tokens; without "
        "it, rows without a token stay",
    )
    tokens: dict[str, TokenSettings] = Field(
        {}, description="by token, the row that models have for it; a token that no model has is added"
    )
    chat_template: str | None = Field(
        None,
        pattern=r"^auto$|\{",
        description="a Jinja template; auto: the one that most of the models have; without it, that of the source",
    )

    def check(self, models: list[str]) -> None:
        """Check that named models are in the recipe; raises ValueError."""
        if self.source not in ["union", *models]:
            raise ValueError(f"tokenizer.source: found {self.source}; expected one of {', '.join(['union', *models])}")
        for token, one in self.tokens.items():
            for name in one.models():
                if name not in models:
                    raise ValueError(
                        f"tokenizer.tokens.{token}.source: found {name}; expected one of {', '.join(models)}"
                    )
