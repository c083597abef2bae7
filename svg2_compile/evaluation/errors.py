"""What an evaluation raises."""


class EvaluationError(RuntimeError):
    """The evaluation cannot go on; the message says what to do. What is finished is kept."""
