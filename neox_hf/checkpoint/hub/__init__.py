"""Publishing checkpoints on the Hugging Face Hub, in the background and never in the way of training."""

from neox_hf.checkpoint.hub.loss_curve import plot_loss_curve
from neox_hf.checkpoint.hub.model_card import CardFacts, model_card
from neox_hf.checkpoint.hub.publisher import HubPublisher
from neox_hf.checkpoint.hub.report import PublishReport

__all__ = ["CardFacts", "HubPublisher", "PublishReport", "model_card", "plot_loss_curve"]
