// How fast a program of the llama.cpp family is, over its library's interface (llama.h): prompts, tokens
// one by one at some depths, and several sequences together. One JSON object on stdout. Built and called
// by runtimes.py beside this file.
//
//     llama_bench bench MODEL THREADS ROUNDS
//     llama_bench quantize MODEL OUT FTYPE HEAD      (numbers of llama_ftype and ggml_type)

#include "llama.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr int kPrompt = 512, kTokens = 64, kSteps = 24, kContext = 4096;
const std::vector<int> kDepths = {0, 2048, 3968};
const std::vector<int> kBatches = {8, 16};

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

// A pass over tokens[i], which is at positions[i] of sequence sequences[i]; logits of the last `wanted`.
class Model {
  public:
    Model(const char * path, int threads, int sequences) {
        llama_model_params params = llama_model_default_params();
        params.n_gpu_layers = 0;
#ifdef PEER_IK
        params.n_seq_max = sequences;
        params.n_ubatch = kPrompt;
        model = llama_model_load_from_file(path, params);
#else
        model = llama_load_model_from_file(path, params);
#endif
        if (!model) fail(std::string("cannot load ") + path);
        llama_context_params context = llama_context_default_params();
        context.n_ctx = kContext + 128;
        context.n_batch = context.n_ubatch = kPrompt;
        context.n_seq_max = sequences;
        context.n_threads = context.n_threads_batch = threads;
        if (const char * flash = std::getenv("PEER_FLASH")) context.flash_attn = *flash == '1';
#ifdef PEER_IK
        this->context = llama_init_from_model(model, context);
#else
        this->context = llama_new_context_with_model(model, context);
#endif
        if (!this->context) fail("cannot make a context");
        vocabulary = llama_n_vocab(model);
        batch = llama_batch_init(kPrompt, 0, 1);
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

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    size_t n = values.size();
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

void bench(const char * path, int threads, int rounds) {
    Model model(path, threads, *std::max_element(kBatches.begin(), kBatches.end()));
    model.one(0, 32);
    std::vector<double> prompt;
    std::vector<std::vector<double>> decode(kDepths.size()), together(kBatches.size());
    for (int round = 0; round < rounds; round++) {
        model.clear();
        double begin = now();
        model.one(0, kPrompt);
        prompt.push_back(kPrompt / (now() - begin));
        model.clear();
        int at = 0;
        for (size_t d = 0; d < kDepths.size(); d++) {
            for (; at < kDepths[d]; at += std::min(kPrompt, kDepths[d] - at))
                model.one(at, std::min(kPrompt, kDepths[d] - at));
            begin = now();
            for (int i = 0; i < kTokens; i++) model.one(at++, 1);
            decode[d].push_back(kTokens / (now() - begin));
        }
        for (size_t b = 0; b < kBatches.size(); b++) {
            model.clear();
            model.together(0, kBatches[b]);
            begin = now();
            for (int i = 1; i <= kSteps; i++) model.together(i, kBatches[b]);
            together[b].push_back(kBatches[b] * kSteps / (now() - begin));
        }
    }
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    std::printf("{\"prefill_tok_s\": %.2f", median(prompt));
    for (size_t d = 0; d < kDepths.size(); d++)
        std::printf(", \"decode_%d_tok_s\": %.2f", kDepths[d], median(decode[d]));
    for (size_t b = 0; b < kBatches.size(); b++)
        std::printf(", \"batch_%d_tok_s\": %.2f", kBatches[b], median(together[b]));
    std::printf(", \"peak_rss_bytes\": %lld}\n", usage.ru_maxrss * 1024LL);
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
    if (argc == 5 && !std::strcmp(argv[1], "bench")) bench(argv[2], std::atoi(argv[3]), std::atoi(argv[4]));
    else if (argc == 6 && !std::strcmp(argv[1], "quantize")) quantize(argv[2], argv[3], std::atoi(argv[4]), std::atoi(argv[5]));
    else fail("llama_bench bench MODEL THREADS ROUNDS | llama_bench quantize MODEL OUT FTYPE HEAD");
}
