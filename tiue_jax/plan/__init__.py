"""Will a run fit on a TPU pod, and how fast can it be: asked before the pod is rented (see __main__.py)."""
