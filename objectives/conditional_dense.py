"""RPT with the paper's conditional dense reward (appendix A): 0 in groups without a right one."""
from objectives import dense


class Objective(dense.Objective):
    conditional = True
