// How fast a program of the llama.cpp family is, over its library's interface (llama.h): a prompt, tokens one
// by one at some depths, and several sequences together, each once. One JSON object, the last line of
// stdout. Built and called by runtimes.py beside this file.
//
//     llama_bench bench MODEL THREADS PROMPT TOKENS DEPTH,... STEPS SEQUENCES,...
//     llama_bench quantize MODEL OUT FTYPE HEAD      (numbers of llama_ftype and ggml_type)

#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

[[noreturn]] void fail(const std::string & what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(1);
}

void quiet(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

// A model with a cache of keys and values, and passes over tokens that follow from their place.
class Model {
  public:
    Model(const char * path, int threads, int prompt, int positions, int sequences) {
        llama_model_params params = llama_model_default_params();
        params.n_gpu_layers = 0;
#ifdef PEER_IK
        params.n_seq_max = sequences;
        params.n_ubatch = prompt;
        model = llama_model_load_from_file(path, params);
#else
        model = llama_load_model_from_file(path, params);
#endif
        if (!model) fail(std::string("cannot load ") + path);
        llama_context_params context = llama_context_default_params();
        context.n_ctx = positions;
        context.n_batch = context.n_ubatch = prompt;
        context.n_seq_max = sequences;
        context.n_threads = context.n_threads_batch = threads;
#ifdef PEER_IK
        this->context = llama_init_from_model(model, context);
#else
        this->context = llama_new_context_with_model(model, context);
#endif
        if (!this->context) fail("cannot make a context");
        vocabulary = llama_n_vocab(model);
        batch = llama_batch_init(std::max(prompt, sequences), 0, 1);
    }

    void clear() { llama_kv_cache_clear(context); }

    // Tokens of one sequence after `at` others.
    void one(int at, int count) {
        batch.n_tokens = 0;
        for (int i = 0; i < count; i++) add(at + i, 0, i == count - 1);
        run();
    }

    // A token of each sequence, all at `at`.
    void together(int at, int sequences) {
        batch.n_tokens = 0;
        for (int i = 0; i < sequences; i++) add(at, i, true);
        run();
    }

  private:
    void add(int position, int sequence, bool logits) {
        int i = batch.n_tokens++;
        batch.token[i] = (int) ((position * 7919LL + sequence * 104729LL + 11) % vocabulary);
        batch.pos[i] = position;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = sequence;
        batch.logits[i] = logits;
    }

    void run() {
        if (llama_decode(context, batch)) fail("llama_decode failed");
        llama_synchronize(context);
    }

    llama_model * model;
    llama_context * context;
    llama_batch batch;
    int vocabulary;
};

std::vector<int> numbers(const char * list) {
    std::vector<int> found;
    std::stringstream stream(list);
    for (std::string number; std::getline(stream, number, ',');) found.push_back(std::atoi(number.c_str()));
    return found;
}

void bench(const char * path, int threads, int prompt, int tokens, const std::vector<int> & depths, int steps,
           const std::vector<int> & batches) {
    int sequences = *std::max_element(batches.begin(), batches.end());
    int positions = std::max({prompt, depths.back() + tokens, sequences * (steps + 1)});
    Model model(path, threads, prompt, (positions + 255) / 256 * 256, sequences);
    model.one(0, 32);
    model.clear();
    double begin = now();
    model.one(0, prompt);
    std::string found = "{\"prefill_tok_s\": " + std::to_string(prompt / (now() - begin));
    auto add = [&](const char * what, int which, double rate) {
        found += std::string(", \"") + what + "_" + std::to_string(which) + "_tok_s\": " + std::to_string(rate);
    };
    model.clear();
    int at = 0;
    for (int depth : depths) {
        while (at < depth) {
            int count = std::min(prompt, depth - at);
            model.one(at, count);
            at += count;
        }
        begin = now();
        for (int i = 0; i < tokens; i++) model.one(at++, 1);
        add("decode", depth, tokens / (now() - begin));
    }
    for (int batch : batches) {
        model.clear();
        model.together(0, batch);
        begin = now();
        for (int i = 1; i <= steps; i++) model.together(i, batch);
        add("batch", batch, batch * steps / (now() - begin));
    }
    std::printf("%s}\n", found.c_str());
}

void quantize(const char * in, const char * out, int type, int head) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.nthread = 2;
    params.ftype = (llama_ftype) type;
    params.output_tensor_type = params.token_embedding_type = (ggml_type) head;
    params.allow_requantize = true;
    if (llama_model_quantize(in, out, &params)) fail(std::string("cannot quantize ") + in);
}

} // namespace

int main(int argc, char ** argv) {
    llama_log_set(quiet, nullptr);
    llama_backend_init();
    auto number = [&](int i) { return std::atoi(argv[i]); };
    if (argc == 9 && !std::strcmp(argv[1], "bench"))
        bench(argv[2], number(3), number(4), number(5), numbers(argv[6]), number(7), numbers(argv[8]));
    else if (argc == 6 && !std::strcmp(argv[1], "quantize"))
        quantize(argv[2], argv[3], number(4), number(5));
    else
        fail("arguments are missing: see the top of llama_bench.cpp");
}
