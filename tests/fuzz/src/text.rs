//! What is done with a tokenizer that a hostile file describes.

use trine_tokenizer::Tokenizer;

/// Encodes, decodes and streams a text; ids must be below the vocabulary's size.
pub fn use_tokenizer(tokenizer: &Tokenizer, text: &str) {
    let size = tokenizer.vocab_size();
    let _ = (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.eot_id(), tokenizer.adds_bos());
    let _ = (tokenizer.special_tokens(), tokenizer.hash(), tokenizer.token(u32::MAX));
    let mut ids: Vec<u32> = text.bytes().take(64).map(u32::from).collect();
    for encoded in
        [tokenizer.encode(text, true), tokenizer.encode(text, false), tokenizer.encode_plain(text)]
    {
        let Ok(encoded) = encoded else { continue };
        assert!(encoded.iter().all(|&id| (id as usize) < size), "{encoded:?} of {size}");
        ids.extend(encoded.into_iter().take(256));
    }
    for skip in [false, true] {
        let mut streamed = String::new();
        let mut detokenizer = tokenizer.detokenizer(skip);
        let mut known = Vec::new();
        for &id in &ids {
            if let Ok(text) = detokenizer.push(id) {
                streamed.push_str(&text);
                known.push(id);
            }
        }
        streamed.push_str(&detokenizer.finish());
        let _ = tokenizer.decode(&known, skip);
    }
}
