"""Three questions, three answers.

python -m examples.first_answers
python -m examples.first_answers --api-url http://127.0.0.1:8000
"""

from examples.which_model import make_model, options

QUESTIONS = ["What is the capital of France?", "What colour is a ruby?", "How many days does a week have?"]


def main(api_url: str = "") -> None:
    model = make_model(api_url, prompt="Answer in one short sentence. {input}")
    for question, answer in zip(QUESTIONS, model.predict_batches(QUESTIONS), strict=True):
        print(f"{question} -> {answer.strip()}")


if __name__ == "__main__":
    main(options(__doc__).parse_args().api_url)
