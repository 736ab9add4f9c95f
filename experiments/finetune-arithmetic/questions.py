"""Questions of arithmetic as conversations: questions.py SEED > writes train.jsonl and test.jsonl."""
import json, random

random.seed(7)
pairs = [(op, a, b) for op in "+-" for a in range(50) for b in range(50) if op == "+" or a >= b]
random.shuffle(pairs)


def chat(op, a, b):
    result = a + b if op == "+" else a - b
    return {"messages": [{"role": "user", "content": f"What is {a} {op} {b}?"},
                         {"role": "assistant", "content": f"{a} {op} {b} = {result}."}]}


for name, part in (("test", pairs[:200]), ("train", pairs[200:])):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(chat(*pair)) + "\n" for pair in part)
