"""The threshold of the router that a generation with `max_cost` uses."""

from dataclasses import replace

from lepton.engine.options import GenerationOptions
from lepton.errors import InputError
from lepton.model import Network
from lepton.model.budget import Budget
from lepton.values import Least, positive_nats


def budget_of(model: Network, options: GenerationOptions) -> Budget:
    """Return the budget that the model's checkpoint holds for `options.max_cost`.

    Raises:
        InputError: none was calibrated for this cost, or `options` ask for other thinking than it was calibrated with;
            or the model has no router.
    """
    max_cost, router = positive_nats(options.max_cost), model.idea("router")
    if router is None:
        raise InputError(f"max_cost={max_cost:g}: this model has no router and always runs all blocks; leave it out")
    if options.think is not None:
        raise InputError(
            f"max_cost={max_cost:g} with think={options.think}: it was calibrated with the model's own rounds of "
            "thinking; leave think out"
        )
    found = next((each for each in router.budgets if each.max_cost == max_cost), None)
    if found is None:
        known = ", ".join(f"{each.max_cost:g}" for each in sorted(router.budgets, key=lambda each: each.max_cost))
        raise InputError(
            f"max_cost={max_cost:g} was not calibrated for this model (costs that were: {known or 'none'}): run python "
            f"-m lepton calibrate --checkpoint FILE --max_cost {max_cost:g}, then load that file"
        )
    return found


def budgeted(model: Network, options: GenerationOptions) -> GenerationOptions:
    """Return options with the threshold of their `max_cost` as depth; without one they stay as they are.

    Raises:
        InputError: as `budget_of`.
    """
    if options.max_cost is None:
        return options
    return replace(options, max_cost=None, depth=Least(budget_of(model, options).least))
