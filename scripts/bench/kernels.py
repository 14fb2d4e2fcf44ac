"""Time DCA's decode and prefill on a GPU, one layer, beside flash-attention and the floors.

Usage: python -m scripts.bench.kernels [--dry-run] [--output FILE]

Needs torch and Triton. flash-attention is one causal call over the same pages, by vLLM's build
or the flash-attn package; where neither is there, its column says n/a. Decode is timed in a
CUDA graph, as an engine replays it. Before a case is timed, both answers are checked against
the fp64 reference. Each case is written when it is done; one that fails is told at the end.

Floors: a case cannot be faster than its keys and values at the bandwidth of a copy, nor faster
than its products at the rate of a matrix product. Both are measured first. (Contexts that fit
into the GPU's cache can be faster than the copy.)

Bytes are worked out, not measured, by `scripts.bench.moves`: floor_MB has every key and value,
query and answer once; moved_MB what the launches move besides.
"""

from typing import Any

from scripts.bench import cases, clock, moves, providers
from scripts.bench.cases import Case
from scripts.bench.layer import Layer
from scripts.common import record
from vllm_dca.cuda import device
from vllm_dca.method.config import DcaSettings
from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.kv_cache import split_kv

FLASH = ("vllm_flash_attn", "flash_attn")


class Bench:
    """The cases' layers run by DCA's device, with the best provider, and by flash-attention."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.can, self.cannot = providers.usable(page)
        self.provider = next(iter(self.can))
        self.flash = next((name for name in FLASH if name in self.can), None)
        self.device = device.with_provider(
            self.provider, self.can[self.provider], None, clock.multiprocessors(), clock.DEVICE
        )

    def decode_plan(self, layer: Layer, case: Case) -> tuple[Any, Any]:
        """What plans a step, and the plan."""
        sizes = case.shape.chunk_size, case.shape.local_size
        settings = DcaSettings(*sizes, None, "the benchmark", case.shape.chunk_size)
        planner = self.device.decode_planner(
            settings, self.page, case.batch, case.shape.heads // case.shape.kv_heads
        )
        lengths = layer.starts.to(clock.DEVICE), layer.seq_lens.to(clock.DEVICE)

        def plan() -> Any:
            return planner(*lengths, layer.block_table, case.batch)

        return plan, plan()

    def decode(self, layer: Layer, plan: Any) -> None:
        self.device.decode(
            layer.query,
            layer.kv_cache,
            layer.output,
            plan=plan,
            rotation=layer.rotation,
            softmax_scale=layer.scale,
        )

    def by_flash(self, layer: Layer) -> Any:
        """One causal call: chunks longer than the context. None without flash-attention."""
        if self.flash is None:
            return None
        attend = self.can[self.flash]
        plain = ChunkGeometry(2 * layer.context + self.page, self.page)
        [segments] = layer.plan_prefill(device.prefill_by(attend), plain).passes

        def run() -> None:
            attend(
                layer.query,
                *split_kv(layer.kv_cache),
                layer.output,
                segments=segments,
                softmax_scale=layer.scale,
            )

        run()
        layer.check(geometry=plain)
        return run

    def decode_row(self, case: Case) -> dict[str, Any]:
        layer = providers.layer_of(case, self.page)
        plan_step, plan = self.decode_plan(layer, case)
        self.decode(layer, plan)
        layer.check()
        found = self._beside_flash(
            case, layer, lambda: self.decode(layer, plan), clock.replayed
        )
        return {
            **found,
            "launched_ms": clock.launched(lambda: self.decode(layer, plan)),
            "plan_ms": clock.replayed(plan_step),
            **moves.decode(case, clock.multiprocessors()),
        }

    def prefill_row(self, case: Case) -> dict[str, Any]:
        layer = providers.layer_of(case, self.page)
        by = self.device.prefill
        plan = layer.plan_prefill(by)
        layer.prefill(plan, by)
        layer.check()
        found = self._beside_flash(case, layer, lambda: layer.prefill(plan, by), clock.launched)
        moved = moves.by_one_launch if self.provider == "triton" else moves.by_passes
        return {**found, **moves.prefill(moved, case)}

    def _beside_flash(self, case: Case, layer: Layer, run: Any, timed: Any) -> dict[str, Any]:
        dca, flash = timed(run), self.by_flash(layer)
        flash_ms = timed(flash) if flash else "n/a"
        return {
            "case": str(case),
            **case._asdict(),
            "dca_ms": dca,
            "flash_ms": flash_ms,
            "over_flash": dca["median"] / flash_ms["median"] if flash else "n/a",
            "launches": clock.launches(run),
        }


def with_floors(row: dict[str, Any], case: Case, facts: dict[str, Any]) -> dict[str, Any]:
    """A row with the milliseconds that its bytes and its operations take at least."""
    copy = case.cache_bytes / facts["copy_bytes_per_second"] * 1e3
    product = case.operations / facts["product_operations_per_second"] * 1e3
    share = max(copy, product) / row["dca_ms"]["median"]
    return {**row, "floor_copy_ms": copy, "floor_product_ms": product, "of_floor": share}


LAYOUT = "{:56}{:>10}{:>10}{:>11}{:>9}{:>12}{:>10}{:>10}{:>10}{:>10}"
COLUMNS = (
    "case DCA_ms flash_ms DCA/flash copy_ms product_ms of_floor launches floor_MB moved_MB"
)


def printed(row: dict[str, Any]) -> str:
    flash = row["flash_ms"]
    numbers = [
        row["dca_ms"]["median"],
        flash if flash == "n/a" else flash["median"],
        row["over_flash"],
        *(row[name] for name in ("floor_copy_ms", "floor_product_ms", "of_floor")),
    ]
    cells = (number if isinstance(number, str) else f"{number:.3f}" for number in numbers)
    sizes = (f"{row[name] / 1e6:,.1f}" for name in ("floor_bytes", "moved_bytes"))
    return LAYOUT.format(row["case"], *cells, row["launches"], *sizes)


def main() -> None:
    args = clock.arguments(__doc__.splitlines()[0])
    facts = {**record.provenance("triton"), **clock.prepare()}
    # The package takes large pages only; vLLM's build takes those that vLLM chooses.
    pages = providers.SMALL_PAGE, providers.PAGE
    bench = Bench(pages[0])
    if bench.flash is None and not args.dry_run:
        bench = Bench(pages[1])
    facts |= {
        "provider": bench.provider,
        "flash_attention": bench.flash or "n/a",
        "cannot": bench.cannot,
        "page": bench.page,
        "dtype": str(cases.DTYPE),
    }
    copies, multiplies = facts["copy_bytes_per_second"], facts["product_operations_per_second"]
    print(
        f"{facts['device']}: copies {copies / 1e12:.2f} TB/s, multiplies "
        f"{multiplies / 1e12:.0f} TFLOP/s; prefill by {bench.provider}, flash-attention: "
        f"{facts['flash_attention']}"
    )
    print(LAYOUT.format(*COLUMNS.split()))
    journal = record.Journal(args.output, facts)
    for step, found in (("decode", cases.decode), ("prefill", cases.prefill)):
        for case in found(args.dry_run):
            with journal.attempt(f"{step}, {case}"):
                row = getattr(bench, f"{step}_row")(case)
                journal.add({"step": step, **with_floors(row, case, facts)})
                print(printed(journal.results[-1]), flush=True)
    journal.end()


if __name__ == "__main__":
    main()
