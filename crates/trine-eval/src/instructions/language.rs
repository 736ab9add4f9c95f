//! Which language a text is in, by the `langdetect` crate: the same profiles and the same steps as the
//! Python package of this name, with its seed 0, so that the answer is always the same.

use std::sync::{Arc, LazyLock};

use langdetect::{DetectorFactory, Seed};

use super::Check;
use super::arguments::Arguments;

static DETECTOR: LazyLock<DetectorFactory> = LazyLock::new(|| {
    let mut factory = DetectorFactory::builtin().clone();
    factory.seed = Seed::Int(0);
    factory
});

/// Whether a text is in the language of this code of two letters (`zh-cn`, `zh-tw`). A text without
/// letters is in any: the benefit of the doubt is the original's.
pub(super) fn is_in(text: &str, code: &str) -> bool {
    DETECTOR.detect(text).map_or(true, |found| found == code)
}

/// All of it is in a language.
pub(super) fn response_language(arguments: &Arguments<'_>) -> Result<Check, String> {
    let code = arguments.text("language")?;
    Ok(Arc::new(move |text| is_in(text, &code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn languages_are_told_apart() {
        for (code, text) in [
            ("en", "The harbour was quiet in the morning, and nobody spoke."),
            ("de", "Am Morgen war der Hafen still, und niemand sprach ein Wort."),
            ("sw", "Bandari ilikuwa kimya asubuhi, na hakuna mtu aliyezungumza."),
            ("hi", "सुबह बंदरगाह शांत था और कोई नहीं बोला।"),
            ("mr", "सकाळी बंदर शांत होते आणि कोणीही बोलले नाही."),
            ("kn", "ಬೆಳಿಗ್ಗೆ ಬಂದರು ಶಾಂತವಾಗಿತ್ತು ಮತ್ತು ಯಾರೂ ಮಾತನಾಡಲಿಲ್ಲ."),
        ] {
            assert!(is_in(text, code), "{code}");
            assert!(!is_in(text, "fr"), "{code}");
        }
        assert!(is_in("12 + 3", "en"));
    }
}
