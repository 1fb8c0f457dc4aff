"""What the engine alone can do on a CPU: step time and tokens per second at each brownout level.

One engine with the demo's configuration runs in this process, loaded by a closed loop without HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.loadgen.closed_loop import ClosedLoop, run_closed_loop, throughput
from benchmarks.loadgen.in_process import EngineClient
from benchmarks.report import percentile
from benchmarks.results import RESULTS, markdown_table, write_result
from benchmarks.scenario import REPOSITORY, Scenario, load_scenario
from cluster.serve_file import load_serve_file
from engine.async_engine import AsyncEngine
from engine.types import BrownoutSetting


@dataclass(frozen=True, slots=True)
class LevelFigures:
    """One level, both phases pinned to it. ``step_time_s`` is the start-up profile's, for a full decode batch."""

    level: int
    name: str
    step_time_s: float
    req_s: float
    tok_s: float  # completion tokens
    tpot_p50_s: float | None
    dimmed_share: float


async def measure_levels(
    engine: AsyncEngine, scenario: Scenario, loop_spec: ClosedLoop, levels: range
) -> list[LevelFigures]:
    """The same requests at each level in turn."""
    figures = []
    for level in levels:
        engine.apply_setting(BrownoutSetting.pinned(level, reason="pinned"))
        requests = scenario.requests(engine.info.vocab_size, seed_offset=level)  # no prefix hits of the last level's
        records = await run_closed_loop(EngineClient(engine).send, requests, loop_spec)
        rate = throughput(records, loop_spec)
        pairs = [r.brownout for r in records if r.brownout is not None]
        figures.append(
            LevelFigures(
                level=level,
                name=engine.info.level_names[level],
                step_time_s=engine.info.step_time_s_by_level[level],
                req_s=rate.req_s,
                tok_s=rate.tok_s,
                tpot_p50_s=percentile([r.tpot_s for r in records], 50),
                dimmed_share=sum(p.dimmed_pairs for p in pairs) / sum(p.routed_pairs for p in pairs),
            )
        )
    return figures


async def _measure(scenario: Scenario, loop_spec: ClosedLoop) -> list[LevelFigures]:
    config = load_serve_file(scenario.serve_config_path).config
    engine = await AsyncEngine.start(config.engine_config())
    try:
        return await measure_levels(engine, scenario, loop_spec, range(engine.info.num_levels))
    finally:
        await engine.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_cpu", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--scenario", type=Path, default=REPOSITORY / "benchmarks/scenarios/demo.yaml")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--measure-s", type=float, default=10.0, help="measured seconds per level, after 3 s of ramp")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    scenario = load_scenario(arguments.scenario)
    loop_spec = ClosedLoop(arguments.concurrency, ramp_s=3.0, measure_s=arguments.measure_s)
    figures = asyncio.run(_measure(scenario, loop_spec))
    write_result(
        arguments.out / "cpu_engine.json",
        {"seed": scenario.seed, "closed_loop": asdict(loop_spec), "levels": [asdict(f) for f in figures]},
    )
    rows = [
        (
            str(f.level),
            f.name,
            f"{f.step_time_s * 1e3:.1f}",
            f"{f.step_time_s / figures[0].step_time_s:.2f}",
            f"{f.tok_s:.0f}",
            "-" if f.tpot_p50_s is None else f"{f.tpot_p50_s * 1e3:.1f}",
            f"{f.dimmed_share:.0%}",
        )
        for f in figures
    ]
    header = ("level", "name", "step (ms)", "of level 0", "tokens/s", "TPOT p50 (ms)", "dimmed pairs")
    print(markdown_table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
