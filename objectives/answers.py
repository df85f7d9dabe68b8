r"""Questions with one exact answer, as in GSM8K: think, then put the answer into \boxed{}.

The reward is 1 if the box holds the same number or text (data/answers.py), else 0. --data names a
file of questions (data/questions.py).
"""
from data.answers import answers_equal
from data.prompt import check_question_template, solve_prompt
from data.questions import read_questions
from objectives import Base, Question
from objectives.rpt import predictions


class Objective(Base):
    def __init__(self, args, tokenizer, config):
        super().__init__(args, tokenizer, config)
        if not args.data:
            raise ValueError("--objective answers needs --data")
        check_question_template(args.template)
        self.questions = read_questions(args.data)
        self.positions = range(len(self.questions))

    def question(self, position):
        text, truth = self.questions[position]
        prompt = solve_prompt(self.tokenizer, text, self.args.template)
        if len(prompt) > self.longest:
            raise ValueError(f"question {position + 1}, {text[:40]!r}..., takes {len(prompt)} "
                             f"tokens, and there is room for {max(0, self.longest)}: raise "
                             "--max-prompt-tokens, lower --max-new-tokens or drop it")
        return Question(prompt, truth, self.tokenizer.encode(text), position)

    def longest_prompt(self):
        """Builds every prompt, so that one that is too long stops the run before its first step."""
        return max(len(self.question(position).prompt) for position in self.positions)

    def score(self, policy, groups):
        for group in groups:
            group.predictions = predictions(self.tokenizer, group.rollouts)
            truth = group.question.truth
            group.rewards = [float(answers_equal(p, truth)) for p in group.predictions]

    def is_right(self, prediction, truth):
        return answers_equal(prediction, truth)
