r"""Questions with one exact answer, as in GSM8K: think, then put the answer into \boxed{}.

The reward is 1 if the box holds the same number or text (data/answers.py), else 0. --data names a
file of questions (data/questions.py).
"""
from data.answers import answers_equal
from data.prompt import check_question_template, solve_prompt
from data.questions import boxed_answer, leave_out_long, read_questions
from objectives import Base, Question
from objectives.rpt import predictions


class Objective(Base):
    def __init__(self, args, tokenizer, config):
        super().__init__(args, tokenizer, config)
        if not args.data:
            raise ValueError("--objective answers needs --data")
        check_question_template(args.template)
        self.questions = read_questions(args.data, args.skip_bad)
        texts = [text for text, _ in self.questions]
        # Every prompt, so that one that is too long stops the run before its first step.
        self.prompts = [solve_prompt(tokenizer, text, args.template) for text in texts]
        self.positions = leave_out_long(
            texts, list(map(len, self.prompts)), self.longest, args.skip_long,
            "raise --max-prompt-tokens or lower --max-new-tokens")

    def question(self, position):
        text, truth = self.questions[position]
        return Question(self.prompts[position], truth, self.tokenizer.encode(text), position)

    def longest_prompt(self):
        return max(len(self.prompts[position]) for position in self.positions)

    def score(self, policy, groups):
        for group in groups:
            group.predictions = predictions(self.tokenizer, group.rollouts, boxed_answer)
            truth = group.question.truth
            group.rewards = [float(answers_equal(p, truth)) for p in group.predictions]

    def is_right(self, prediction, truth):
        return answers_equal(prediction, truth)
