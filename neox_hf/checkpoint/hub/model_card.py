"""The README.md of a published model: metadata the Hub reads, and what a person wants to know."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

HUB_PREFIX = "hub:"  # of a source that is a Hub dataset, as recipes write it


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card tells.

    repo_id: `owner/name`. model_type: `gpt_neox`, which stock transformers loads, or `neox_hf`, which needs this
    package. parameters: count. tokens: seen in training. steps: optimizer steps. sources: as the recipe names them,
    `hub:owner/name` for a Hub dataset. architecture, hyperparameters: name -> value. revisions: of earlier steps.
    eval_loss: nats per token on held-out samples. loss_curve: file name of the picture in the repository.
    versions: package -> version.
    """

    repo_id: str
    license: str
    parameters: int
    tokens: int
    steps: int
    sources: Sequence[str]
    model_type: str = "gpt_neox"
    architecture: Mapping[str, object] = field(default_factory=dict)
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    revisions: Sequence[str] = ()
    eval_loss: float | None = None
    loss_curve: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.repo_id.split("/")[-1]

    @property
    def perplexity(self) -> float | None:
        """exp(eval_loss); None where that is not a finite number."""
        if self.eval_loss is None or not self.eval_loss < math.log(1e300):
            return None
        return math.exp(self.eval_loss)

    @property
    def datasets(self) -> list[str]:
        """Ids of the sources that are on the Hub."""
        return [_source_name(source) for source in self.sources if source.startswith(HUB_PREFIX)]


def model_card(facts: CardFacts) -> str:
    """The text of README.md: a YAML head between `---` lines, then Markdown."""
    sections = [
        _introduction(facts),
        _loading(facts),
        _data(facts),
        _evaluation(facts),
        _section("Architecture", _table(("", ""), facts.architecture)),
        _section("Training", _table(("hyper-parameter", "value"), facts.hyperparameters)),
        _section("Versions", _table(("package", "version"), facts.versions)),
    ]
    return f"---\n{_metadata(facts)}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _metadata(facts: CardFacts) -> str:
    # Here and not above: importing checkpoint code should not import the Hub's client.
    from huggingface_hub import EvalResult, ModelCardData

    measured = [("loss", facts.eval_loss), ("perplexity", facts.perplexity)] if facts.perplexity is not None else []
    dataset = {
        "dataset_type": (facts.datasets or ["text"])[0],
        "dataset_name": ", ".join(map(_source_name, facts.sources)),
    }
    results = [
        EvalResult(
            task_type="text-generation",
            **dataset,
            dataset_split="held-out",
            metric_type=kind,
            metric_value=round(value, 6),
        )
        for kind, value in measured
    ]
    data = ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt_neox", "neox_hf"],
        datasets=facts.datasets or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _introduction(facts: CardFacts) -> str:
    return (
        f"# {facts.name}\n\n"
        f"A GPT-NeoX language model of {facts.parameters:,} parameters, trained on {facts.tokens:,} tokens "
        f"in {facts.steps:,} steps with `neox_hf`."
    )


def _loading(facts: CardFacts) -> str:
    needs = "" if facts.model_type == "gpt_neox" else "import neox_hf  # registers the model type\n"
    code = (
        f"{needs}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{facts.repo_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo_id}")'
    )
    text = f"## How to load\n\n```python\n{code}\n```"
    if facts.revisions:
        example = f'model = AutoModelForCausalLM.from_pretrained("{facts.repo_id}", revision="{facts.revisions[-1]}")'
        listed = ", ".join(f"`{revision}`" for revision in facts.revisions)
        text += f"\n\nCheckpoints of earlier steps are revisions: {listed}.\n\n```python\n{example}\n```"
    return text


def _data(facts: CardFacts) -> str:
    return _section("Data", "\n".join(f"- `{_source_name(source)}`" for source in facts.sources))


def _evaluation(facts: CardFacts) -> str:
    results = {"loss (nats per token)": facts.eval_loss, "perplexity": facts.perplexity}
    table = _table(("on held-out samples", ""), {name: f"{v:.4f}" for name, v in results.items() if v is not None})
    picture = f"![training and evaluation loss]({facts.loss_curve})" if facts.loss_curve else ""
    return _section("Evaluation", "\n\n".join(part for part in (table, picture) if part))


def _source_name(source: str) -> str:
    return source.removeprefix(HUB_PREFIX)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(head: tuple[str, str], rows: Mapping[str, object]) -> str:
    if not rows:
        return ""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """Text that cannot leave its table cell."""
    return " ".join(str(value).split()).replace("|", r"\|")
