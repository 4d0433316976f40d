"""The causes that a diagnosis can name."""

from __future__ import annotations

from collections.abc import Mapping

#: Every cause by name, with what it means; causes before those that may be their consequence.
CAUSES: Mapping[str, str] = {
    # What the run is made of.
    "not_trained": "parameters that ask for a gradient are in no optimizer, or nothing in the loss depends on them",
    "frozen_between": "layers are frozen between layers that are trained",
    "loss_reduction": "the training loss is a multiple of the validation loss: summed instead of averaged, or divided "
    "twice",
    "stuck_data": "the batches come in the same order in every epoch",
    # What is broken while it runs.
    "nonfinite_loss": "the loss was NaN or infinite at single steps, without growing before: the data, or an operation",
    "loss_scale_collapse": "with float16, steps keep being skipped while the loss scale falls",
    "exploding_gradients": "gradients are orders of magnitude larger towards the input, or at many steps",
    "diverged": "the loss rose far above its best and stayed there, or became NaN after it had grown",
    "nothing_moves": "no parameter moved",
    # The learning rate and what acts like one.
    "lr_too_high": "the weights grew by a factor within few steps, or every update turns back the one before",
    "layer_lr_too_high": "the same in few layers, whose learning rate is higher than that of the rest",
    "warmup_missing": "the learning rate was at its peak at once, and the network got stuck in the first steps",
    "matrices_stand_still": "the matrices of a matrix optimizer hardly move, while the fallback rule trains the rest",
    "clipping_limits_step": "nearly every gradient is clipped, far, and the optimizer follows its size",
    "lr_too_low": "updates are so small that the weights stay where they began, and the loss hardly falls",
    "schedule_ended_early": "the learning rate was practically zero for a large part of the run",
    "momentum_too_long": "momentum averages over a large part of the run",
    # The network and the data.
    "dead_units": "units of a layer get no gradient at any measured step",
    "vanishing_gradients": "gradients become smaller by orders of magnitude from the output to the input",
    "decay_dominates": "updates point to zero: weight decay is larger than what the gradient does",
    "decay_on_norms": "weight decay shrinks the scales of normalisation layers",
    "untouched_rows": "most rows of an embedding were never used",
    "no_signal": "the loss stays at chance while the optimizer moves: labels or inputs carry no information",
    "gradient_spikes": "single gradients were far out of the ordinary, and updates were too large or too small "
    "after them",
    "overfitting": "the validation loss rises while the training loss falls",
    # Precision.
    "lost_to_rounding": "updates are smaller than what low-precision weights can resolve",
    "not_orthogonal": "the orthogonalised momentum is farther from orthogonal than its iteration explains",
}
