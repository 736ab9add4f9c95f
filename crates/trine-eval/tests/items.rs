//! Where items come from.

use std::fs;
use std::path::Path;

use trine_eval::{Data, Request, Task};

#[test]
fn data_is_found_by_name_or_the_error_says_how_to_get_it() {
    let dir = tempfile::tempdir().unwrap();
    let task = Task::open("arc_easy").unwrap();
    let error = Data::open(&task, dir.path(), 0).unwrap_err().to_string();
    assert!(
        error.contains("no arc_easy.jsonl in")
            && error.contains("load_dataset(\"allenai/ai2_arc\""),
        "{error}"
    );
    let inner = dir.path().join("sets");
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("arc_easy.jsonl"), "{\"query\":\"q\",\"choices\":[\"a\"],\"gold\":0}\n\n")
        .unwrap();
    assert_eq!(Data::open(&task, dir.path(), 0).unwrap().items.len(), 1);
    assert_eq!(Data::open(&task, &inner.join("arc_easy.jsonl"), 0).unwrap().items.len(), 1);
    let other = dir.path().join("more");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("arc_easy.jsonl"), "{\"query\":\n").unwrap();
    let error = Data::open(&task, dir.path(), 0).unwrap_err().to_string();
    assert!(error.contains("expected one arc_easy.jsonl, found"), "{error}");
    let error = Data::open(&task, &other, 0).unwrap_err().to_string();
    assert!(error.contains("line 1: expected a JSON object"), "{error}");
}

/// Two shards, which are one file, where the build reads them.
#[test]
fn items_may_be_in_parquet() {
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/parquet");
    let dir = tempfile::tempdir().unwrap();
    let names = ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"];
    fs::copy(files.join(names[0]), dir.path().join("arc_easy.parquet")).unwrap();
    fs::copy(files.join(names[1]), dir.path().join(names[1])).unwrap();
    let task = Task::open("arc_easy").unwrap();
    let whole = Data::open(&task, &files.join(names[0]), 0);
    if cfg!(feature = "parquet") {
        let data = whole.unwrap();
        assert_eq!(data.items.len(), 3);
        let request = task.request(0, &data.items[0], &[], 0).unwrap();
        let Request::Choice { options, gold, .. } = request else { panic!("{request:?}") };
        assert_eq!(options[1], ("Question: What is 1?\nAnswer:".into(), " b".into()));
        assert_eq!(gold, [1]);
        assert_eq!(Data::open(&task, dir.path(), 0).unwrap().items.len(), 2);
        let error = Data::open(&task, &dir.path().join(names[1]), 0).unwrap_err().to_string();
        assert!(error.contains(&format!("{}: cannot read", names[0])), "{error}");
    } else {
        for refused in [whole, Data::open(&task, dir.path(), 0)] {
            let error = refused.unwrap_err().to_string();
            assert!(
                error.contains(".parquet: ") && error.contains("--features parquet"),
                "{error}"
            );
        }
    }
}
