"""Ask the demo one question, and let its reward models choose among eight answers."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")
question = "What are the diet and the colour of the owl?"
answer = client.chat.completions.create(
    model="demo",
    messages=[{"role": "user", "content": question}],
    seed=1,
    extra_body={
        "align": {
            "best_of_n": {"n": 8},
            # "quality" chooses. "gold" is the demo's true reward: weight 0 only shows it.
            "rewards": {"quality": 1.0, "gold": 0.0},
            "details": "candidates",
        }
    },
)

print(answer.choices[0].message.content)
print(answer.align["reason"])
print("quality   gold  candidate")
for candidate in answer.align["candidates"]:
    scores = candidate["scores"]
    text = candidate["choice"]["message"]["content"]
    print(f"{scores['quality']['value']:7.2f} {scores['gold']['value']:6.2f}  {text}")
