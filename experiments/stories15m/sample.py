"""Stories that the teacher tells, of a server: sample.py 8000 > stories.jsonl

    trine serve teacher --port 8371 --max-running 32
"""
import concurrent.futures, json, sys, urllib.request

URL = "http://127.0.0.1:8371/v1/completions"


def story(seed):
    request = {"prompt": [1], "max_tokens": 250, "temperature": 1.0, "seed": seed}
    request = urllib.request.Request(URL, json.dumps(request).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["choices"][0]["text"].strip()


with concurrent.futures.ThreadPoolExecutor(32) as pool:
    for text in pool.map(story, range(int(sys.argv[1]))):
        print(json.dumps({"text": text}), flush=True)
