"""Settings that there were, with what to use instead: who has an old command or file is told, and not left to guess."""

REPLACED = {
    "stop_at_saturation": "give --health '{saturation: SHARE}'",
    "max_error_growth": "give --health '{error_growth: SHARE}'",
    "max_distance": "give --health '{distance: SHARE}'",
    "max_gradient_ratio": "give --health '{gradient_spike: RATIO}'",
    "on_forgetting": "give --health '{forgetting: ACTION}'",
    "on_forgetting_quarter": "give --health '{forgetting_quarter: ACTION}'",
    "on_saturation": "give --health '{saturation: [ACTION, SHARE]}'",
    "on_error_growth": "give --health '{error_growth: ACTION}'",
    "on_distance": "give --health '{distance: ACTION}'",
    "on_gradient_spike": "give --health '{gradient_spike: ACTION}'",
    "on_nothing_learnt": "give --health '{nothing_learnt: ACTION}'",
}
