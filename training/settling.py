"""Owns the second phase of the training: short, middle and long windows mixed, with disturbed inputs."""

from training.disturbance import Disturbance
from training.optimizer import LearningRates
from training.train import Recipe
from training.windows import Stage

CYCLE = (Stage(8, 12, 256), Stage(7, 6, 512), Stage(1, 2, 2048))
SETTLING = Recipe(
    stages=CYCLE * 18,
    rates=LearningRates(matrices=0.008, embeddings=2.5e-3),
    warmup_steps=10,
    decay_from=0.1,
    seed=2027,
    disturbance=Disturbance(),
)
