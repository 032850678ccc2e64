"""The stages by name, as recipes and the command know them."""

from uncausal.encoder.training.stages.base import Stage
from uncausal.encoder.training.stages.contrastive import Contrastive
from uncausal.encoder.training.stages.distill import Distill
from uncausal.encoder.training.stages.instruction import Instruction
from uncausal.encoder.training.stages.mntp import MNTP
from uncausal.encoder.training.stages.simcse import SimCSE

STAGES: dict[str, type[Stage]] = {
    stage.__name__.lower(): stage for stage in (MNTP, SimCSE, Contrastive, Instruction, Distill)
}
