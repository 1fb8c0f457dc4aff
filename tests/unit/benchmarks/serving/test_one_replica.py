"""What the serving benchmark makes of a scenario's application."""

from benchmarks.scenario import REPOSITORY, load_scenario
from benchmarks.serving.__main__ import one_replica_at_level_0


def test_one_replica_of_the_first_model_alone():
    file = one_replica_at_level_0(load_scenario(REPOSITORY / "benchmarks/scenarios/demo.yaml"))
    (config,) = file.configs
    assert (config.model.served_name, config.replicas) == ("demo-random", 1)
    assert (config.controller.law, config.controller.level) == ("static", 0)
