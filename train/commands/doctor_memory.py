"""`doctor`: the way to compute a step that training will take on this machine, and the memory that it needs."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from train.commands.findings import Report
from train.common import commands
from train.common.errors import UserError
from train.config.recipe import Recipe
from train.host import checks
from train.host.checks import Finding
from train.host.machine import Card, Machine
from train.model.architecture import Shape
from train.training import cpu_memory, memory_estimate, memory_plan, step_setting
from train.training.memory_setting import Setting
from train.training.step_setting import Place

if TYPE_CHECKING:
    from train.model.decoder import Decoder

# The machine's memory that a process with a card takes: 0.7 GB for torch and DeepSpeed, the rest for CUDA
PROCESS_BYTES = 2 << 30


def as_trained(report: Report, recipe: Recipe, shape: Shape | None, here: Machine, gpus: int) -> Recipe:
    """The recipe with the numbers that `train` takes here for what is `auto`; a failed check where nothing fits.

    shape: of the base; None where its config.json cannot be read, which another check reports.
    """
    processes = gpus or (1 if here.cards else recipe.processes)
    card = _card(here)
    total = card.total if card and card.total and memory_plan.can_plan(card.capability, recipe) else 0
    try:
        chosen, text = step_setting.resolve(recipe, Place(processes, total), shape)
    except UserError as error:
        report.add(Finding("step", "fail", str(error)))
        return step_setting.by_default(recipe, processes)
    if text:
        report.add(Finding("step", "ok", text))
    return chosen


def _card(here: Machine) -> Card | None:
    """The card with most free memory."""
    return max(here.cards, key=lambda card: card.free or 0, default=None)


def check_host_memory(here: Machine, shape: Shape, recipe: Recipe) -> Finding:
    """The machine's memory beside a card: weights are loaded one tensor at a time, so the largest one counts."""
    largest_tensor = memory_estimate.BYTES_16 * shape.vocabulary * shape.hidden
    kept_for_card = memory_plan.host_bytes(shape, Setting.of(recipe))
    return checks.check_memory("memory", PROCESS_BYTES + largest_tensor + kept_for_card, here.free_memory)


def check_training_memory(
    here: Machine, model: "Decoder", shape: Shape, folder: Path, parameters: int, recipe: Recipe
) -> Finding:
    """The planned peak of a step on the card with most free memory; without a plan the least that training takes."""
    card = _card(here)
    if card and card.total and card.free and memory_plan.can_plan(card.capability, recipe):
        return _check_planned_memory(recipe, shape, card.free, card.total)
    if card and card.total and card.free is not None:
        needed = memory_plan.least_bytes(model, folder, recipe, parameters, shape)
        return checks.check_memory("card's memory", needed, card.free, card.total)
    needed = cpu_memory.training_bytes(folder, recipe, parameters)
    return checks.check_memory("memory", needed, here.free_memory, qualifier="about")


def _check_planned_memory(recipe: Recipe, shape: Shape, free: int, total: int) -> Finding:
    """The peak of a step, CUDA's context included. The remedy is the fastest way to compute the same rows that fits."""
    needed = memory_plan.estimate(shape, Setting.of(recipe)).with_context
    finding = checks.check_memory("card's memory", needed, free, total, qualifier="at its peak about")
    chosen = memory_plan.choose(shape, recipe, free)
    if finding.state == "ok" or (chosen and chosen[0] == Setting.of(recipe)):
        return finding
    if chosen is None:
        return replace(finding, remedy=f"{finding.remedy} What would fit: {commands.make('plan', model=recipe.model)}")
    return replace(finding, remedy=f'The same rows per step in less memory: ARGS="{chosen[0].as_text()}"')
