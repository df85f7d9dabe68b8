"""RPT with the paper's first-token reward (appendix A): only the first token has to be right."""
from objectives import rpt


class Objective(rpt.Objective):
    def reward(self, prediction, truth):
        return first_token_match(prediction, truth)


def first_token_match(prediction, truth):
    """1.0 iff the prediction begins with the bytes of the first true token; the rest is ignored.

    The paper compares tokens. A prediction of bytes has none, so " theory" begins with " the" here.
    """
    first = next((token for token in truth if token), None)
    return float(bool(prediction and first and prediction.startswith(first)))
