"""Time the prefill's attention providers against each other on a GPU.

Usage: python -m scripts.bench.providers [--dry-run] [--output FILE]

8,192 new tokens at the end of contexts of 8k to 1M, one layer, by each provider that can serve:
flash-attention's, and this project's own in one launch and by three passes and a merge;
of the others it says why they cannot. Each answer is checked against the fp64 reference first.
"""

import functools
from typing import Any

from scripts.bench import cases, clock
from scripts.bench.cases import Case
from scripts.bench.layer import Layer
from scripts.common import record
from vllm_dca.cuda.device import prefill_by
from vllm_dca.engine.providers import PROVIDERS, in_order
from vllm_dca.method.device import Prefill
from vllm_dca.method.provider import AttentionProvider, Needs, UnusableProviderError

# The flash-attn package takes no smaller one.
PAGE = 256
SMALL_PAGE = 16


def usable(page: int) -> tuple[dict[str, AttentionProvider | Prefill], dict[str, str]]:
    """The providers that can serve, in order of preference, and why the others cannot."""
    needs = Needs(128, cases.DTYPE, cases.DTYPE, page, clock.capability())
    can: dict[str, AttentionProvider | Prefill] = {}
    cannot: dict[str, str] = {}
    for name in in_order("cuda", needs):
        try:
            can[name] = PROVIDERS["cuda"][name](needs)
        except UnusableProviderError as error:
            cannot[name] = str(error)
    return can, cannot


def layer_of(case: Case, page: int) -> Layer:
    return Layer(
        case.shape, case.batch, case.context, case.new, cases.DTYPE, page, str(clock.DEVICE)
    )


def row(case: Case, can: dict[str, AttentionProvider | Prefill], page: int) -> dict[str, Any]:
    layer = layer_of(case, page)
    milliseconds = {}
    for name, provider in can.items():
        by = prefill_by(provider)
        plan = layer.plan_prefill(by)
        layer.output.fill_(float("nan"))
        layer.prefill(plan, by)
        layer.check()
        milliseconds[name] = clock.launched(functools.partial(layer.prefill, plan, by))
    return {"case": str(case), **case._asdict(), "milliseconds": milliseconds}


def main() -> None:
    args = clock.arguments(__doc__.splitlines()[0])
    page = SMALL_PAGE if args.dry_run else PAGE
    can, cannot = usable(page)
    for name, reason in cannot.items():
        print(f"{name}: no, because {reason}")
    facts = {**record.provenance("triton"), **clock.prepare(), "cannot": cannot}
    journal = record.Journal(args.output, facts)
    for case in cases.prefill(args.dry_run):
        with journal.attempt(str(case)):
            found = row(case, can, page)
            journal.add(found)
            times = (f"{name} {ms['median']:.3f}" for name, ms in found["milliseconds"].items())
            print(f"{case}, ms: {', '.join(times)}", flush=True)
    journal.end()


if __name__ == "__main__":
    main()
