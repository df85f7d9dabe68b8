"""RPT whose prompt closes the thought at once: a control that measures what it adds.

Only a box that comes first counts, so that the model cannot think outside <think>.
"""
from objectives import rpt
from reward import box_at_once


class Objective(rpt.Objective):
    extract = staticmethod(box_at_once)

    def __init__(self, args, tokenizer, config):
        super().__init__(args, tokenizer, config)
        before, after = self.template
        self.template = before, after + tokenizer.encode("</think>", special=True)
