"""The charts of diagnostics, for TensorBoard's custom scalars and for figures."""

from __future__ import annotations

#: The charts of each diagnostic, by the first part of its tags: title, kind, and regular expressions of tags.
CHARTS: dict[str, dict[str, tuple[str, list[str]]]] = {
    "gradient": {
        "gradient norm": ("Multiline", [r"gradient/norm$", r"gradient/norm_clipped$"]),
        "clipped steps": ("Multiline", [r"gradient/clipped_fraction$"]),
        "skipped steps and non-finite gradients": ("Multiline", [r"gradient/skipped_steps$", r"gradient/nonfinite$"]),
        "zero gradients": ("Multiline", [r"gradient/zeros$"]),
        "gradient noise scale": ("Multiline", [r"gradient/noise_scale$"]),
    },
    "internals": {
        "optimizer internals": ("Multiline", [r"internals/.*"]),
    },
    "orthogonality": {
        "orthogonality error": ("Multiline", [r"orthogonality/error.*", r"orthogonality/factor_error.*"]),
        "stable rank of updates": ("Multiline", [r"orthogonality/stable_rank$"]),
        "spectral norm of updates": ("Multiline", [r"orthogonality/spectral_norm$"]),
    },
    "sign_collapse": {
        "sign collapse": ("Multiline", [r"sign_collapse/index$"]),
    },
    "spike": {
        "gradient spikes: z-score, response, recovery": (
            "Multiline",
            [r"spike/(zscore|amplification|suppression|recovery_steps)$"],
        ),
        "response to a virtual spike": ("Multiline", [r"spike/probe_(amplification|displacement)/.*"]),
        "steps to recover from a virtual spike": ("Multiline", [r"spike/probe_recovery_steps/.*"]),
    },
    "update": {
        "update size (RMS)": ("Multiline", [r"update/rms$"]),
        "update to weight": ("Multiline", [r"update/to_weight$"]),
        "direction of updates": ("Multiline", [r"update/cosine_.*"]),
        "stalled elements": ("Multiline", [r"update/stalled$"]),
    },
    "update_variance": {
        "update variance": ("Multiline", [r"update_variance/(online|conditional)$"]),
        "update noise to signal": ("Multiline", [r"update_variance/.*_ratio$"]),
        "angle between mini-batches' updates": ("Multiline", [r"update_variance/cosine_spread$"]),
    },
}
