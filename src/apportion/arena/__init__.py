"""How right is credit? Small worlds whose exact advantages are known, and every method measured against them."""

from apportion.arena._bars import exact_advantage, random_credit
from apportion.arena._episodes import Cost, Episodes, World
from apportion.arena._learned import Lesson, with_learned
from apportion.arena._measures import MEASURES, Estimate, Yardstick
from apportion.arena._measuring import from_walk
from apportion.arena._tables import Table
from apportion.arena.worlds.arithmetic import Arithmetic
from apportion.arena.worlds.budgets import Budgets
from apportion.arena.worlds.denoising import Denoising
from apportion.arena.worlds.hackable import Hackable
from apportion.arena.worlds.rooms import Rooms
from apportion.arena.worlds.trees import Trees

__all__ = [
    "Arithmetic",
    "Budgets",
    "Cost",
    "Denoising",
    "Episodes",
    "Estimate",
    "Hackable",
    "Lesson",
    "MEASURES",
    "Rooms",
    "Table",
    "Trees",
    "World",
    "Yardstick",
    "exact_advantage",
    "from_walk",
    "random_credit",
    "with_learned",
]
