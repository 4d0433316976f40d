"""The gradient noise scale: how large a batch has to be before noise no longer dominates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class NoiseScale:
    r"""Running estimate of the simple gradient noise scale :math:`\mathrm{tr}(\Sigma) / |G|^2`, in examples.

    From squared norms of gradients of two batch sizes (McCandlish et al. 2018, `arXiv 1812.06162`_, appendix A.1):

    .. math::
        |G|^2 \approx \frac{B\,|g_B|^2 - b\,|g_b|^2}{B - b}, \qquad
        \mathrm{tr}(\Sigma) \approx \frac{|g_b|^2 - |g_B|^2}{1/b - 1/B}

    Both are unbiased, but their ratio is not, and each alone is noisy: numerator and denominator are therefore
    averaged over steps separately, and divided only then.

    .. _arXiv 1812.06162: https://arxiv.org/abs/1812.06162

    Args:
        decay: Weight of the past in the running means.
        noise: Running mean of :math:`\mathrm{tr}(\Sigma)`, biased towards zero by ``weight``.
        signal: Likewise of :math:`|G|^2`.
        weight: Sum of the weights of the observations so far.

    Example:
        >>> scale = NoiseScale()
        >>> scale.update(small_sq=3.0, big_sq=1.5, small=1, big=4)  # |G|^2 = 1, tr(Sigma) = 2
        >>> scale.value
        2.0
    """

    decay: float = 0.95
    noise: float = 0.0
    signal: float = 0.0
    weight: float = 0.0

    def update(self, small_sq: float, big_sq: float, small: float, big: float) -> None:
        """Take in one step.

        Args:
            small_sq: Mean squared norm of gradients of batches of ``small`` examples.
            big_sq: Squared norm of the gradient of a batch of ``big`` examples.
            small: Size of the small batches.
            big: Size of the big batch.
        """
        noise = (small_sq - big_sq) / (1 / small - 1 / big)
        signal = (big * big_sq - small * small_sq) / (big - small)
        self.noise = self.decay * self.noise + (1 - self.decay) * noise
        self.signal = self.decay * self.signal + (1 - self.decay) * signal
        self.weight = self.decay * self.weight + (1 - self.decay)

    @property
    def value(self) -> float:
        """The noise scale; NaN before the first step and while the estimate of the signal is not positive."""
        return self.noise / self.signal if self.signal > 0 else float("nan")
