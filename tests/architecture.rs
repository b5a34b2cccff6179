//! Which room of the house may look into which: the table, and the proof that it is looked at.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Each room with the rooms it may import, leaves first. A room may import only rooms above it here.
const HOUSE: &[(&str, &[&str])] = &[
    ("status", &[]),
    ("lock", &[]),
    ("observe", &[]),
    ("retry", &[]),
    ("sql", &[]),
    ("statements", &["sql"]),
    ("record", &[]),
    ("error", &["retry", "status"]),
    ("options", &["error", "retry"]),
    ("config", &["error", "options"]),
    ("connect", &["config", "error", "lock", "retry"]),
    (
        "connection",
        &["config", "connect", "error", "lock", "observe", "options", "record", "retry", "statements"],
    ),
    ("transaction", &["connect", "connection", "error", "lock", "observe", "options", "retry"]),
    ("session", &["connection", "error", "observe", "options", "transaction"]),
    ("executor", &["connection", "error", "session", "statements", "transaction"]),
    ("maintenance", &["config", "connection", "lock"]),
    (
        "manager",
        &[
            "config",
            "connection",
            "error",
            "maintenance",
            "observe",
            "options",
            "session",
            "status",
            "transaction",
        ],
    ),
    ("batch", &["connection", "error", "manager", "options", "record", "session", "transaction"]),
    ("testing", &["config", "connect", "error", "lock", "manager", "sql"]),
    ("problem", &["error", "observe"]),
    ("health", &["manager", "problem"]),
    ("lazy_session", &["error", "manager", "session"]),
    ("request", &["error", "lock", "manager", "observe", "options", "transaction"]),
    ("axum", EDGE),
    ("actix_web", EDGE),
    ("guide", &[]),
];

/// What an adapter may look into: the rooms behind every adapter, and no other adapter.
const EDGE: &[&str] =
    &["error", "health", "lazy_session", "manager", "observe", "problem", "request", "session"];

/// Each file with those that it may import.
type Files = &'static [(&'static str, &'static [&'static str])];

/// In each folder, its files with those of the same folder that they may import, leaves first.
const FOLDERS: &[(&str, Files)] = &[
    (
        "connect",
        &[
            ("place", &[]),
            ("frames", &[]),
            ("named", &[]),
            ("flight", &["named"]),
            ("faults", &[]),
            ("wire", &["faults", "flight"]),
            ("exchange", &["flight", "wire"]),
            ("owed", &["exchange"]),
            ("outgoing", &["exchange", "flight", "frames", "named", "owed", "wire"]),
            ("incoming", &["flight", "frames", "named", "outgoing", "owed", "wire"]),
            ("ledger", &["incoming", "named", "outgoing", "owed", "wire"]),
            ("stream", &["ledger", "wire"]),
            // These two through the folder's own door.
            ("dial", &[]),
        ],
    ),
    (
        "connection",
        &[
            ("core", &[]),
            ("reset", &[]),
            ("shell", &["core"]),
            ("drain", &["core", "shell"]),
            ("register", &["shell"]),
            ("connection", &["core", "drain", "register", "shell"]),
            ("arrivals", &["connection"]),
            ("pooled", &["arrivals", "connection", "register", "reset", "shell"]),
            ("request", &["connection", "core", "shell"]),
            ("prepare", &["connection", "core", "request", "shell"]),
            ("block", &["connection", "core", "request", "shell"]),
            ("repair", &["connection", "core", "reset", "shell"]),
            ("stream", &["connection", "request"]),
            ("copy_in", &["connection", "core"]),
            ("copy_out", &["connection", "copy_in", "stream"]),
            ("group", &["connection", "core", "request"]),
            ("rows", &["connection", "core", "group", "request"]),
            ("verbs", &["connection", "copy_in", "copy_out", "core", "request", "stream"]),
        ],
    ),
    (
        "transaction",
        &[
            ("begin", &[]),
            ("outcome", &[]),
            ("transaction", &["begin", "outcome"]),
            ("commit", &["outcome", "transaction"]),
            ("run", &["transaction"]),
        ],
    ),
];

/// The files of the same folder that a file's code names: `super::name`, and the first names in `super::{…}`.
fn neighbours(source: &str) -> BTreeSet<String> {
    let source = code(source);
    let word = |rest: &str| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = BTreeSet::new();
    for rest in source.split("super::").skip(1) {
        let Some(list) = rest.strip_prefix('{') else {
            names.insert(word(rest));
            continue;
        };
        let mut depth = 0;
        let mut first = true;
        for (at, c) in list.char_indices() {
            match c {
                '}' if depth == 0 => break,
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => first = true,
                c if depth == 0 && first && c.is_alphabetic() => {
                    names.insert(word(&list[at..]));
                    first = false;
                }
                _ => {}
            }
        }
    }
    names.remove("");
    names
}

/// That every file of a folder is in the table.
#[test]
fn every_file_of_a_folder_in_the_table_is_there() {
    for (folder, files) in FOLDERS {
        let entries = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(folder)).unwrap();
        let stem = |entry: std::io::Result<fs::DirEntry>| {
            entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned()
        };
        let found: BTreeSet<String> =
            entries.map(stem).filter(|name| name != "mod" && !name.ends_with("_check")).collect();
        let listed: BTreeSet<String> = files.iter().map(|(file, _)| (*file).to_owned()).collect();
        assert_eq!(found, listed, "{folder}");
    }
}

#[test]
fn inside_a_folder_imports_go_one_way_too() {
    for (folder, files) in FOLDERS {
        for (i, (file, allowed)) in files.iter().enumerate() {
            let path =
                Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(folder).join(format!("{file}.rs"));
            let names = neighbours(&fs::read_to_string(path).unwrap());
            let known = |name: &&String| files.iter().any(|(other, _)| other == name);
            for other in names.iter().filter(known).filter(|name| name != file) {
                assert!(allowed.contains(&other.as_str()), "{folder}/{file} imports {other}");
                assert!(files[..i].iter().any(|(above, _)| above == other), "{file} looks up to {other}");
            }
        }
    }
}

#[test]
fn a_wrong_import_of_a_neighbour_is_noticed() {
    let source = "//! Frames.\nuse super::wire::Wire;\n/// See [`super::ledger`].\nuse super::{flight::{Flight, Step}, frames};\n";
    assert_eq!(neighbours(source), BTreeSet::from(["flight", "frames", "wire"].map(str::to_owned)));
}

/// A file without its documentation and its unit tests.
fn code(source: &str) -> String {
    let code =
        source.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    code.split("#[cfg(test)]").next().unwrap_or_default().to_owned()
}

/// The rooms that a file's code names; documentation may link wherever it likes.
fn imports(source: &str) -> BTreeSet<String> {
    code(source)
        .split("crate::")
        .skip(1)
        .map(|rest| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
        .collect()
}

fn complaints(room: &str, source: &str, allowed: &[&str]) -> Vec<String> {
    imports(source)
        .into_iter()
        .filter(|other| other != room && !allowed.contains(&other.as_str()))
        .map(|other| format!("{room} imports {other}"))
        .collect()
}

fn sources(room: &str) -> Vec<String> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let file = src.join(format!("{room}.rs"));
    if file.exists() {
        return vec![fs::read_to_string(file).unwrap()];
    }
    let files = fs::read_dir(src.join(room)).unwrap();
    files.map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap()).collect()
}

#[test]
fn imports_go_one_way() {
    for (i, (room, allowed)) in HOUSE.iter().enumerate() {
        for other in *allowed {
            assert!(HOUSE[..i].iter().any(|(above, _)| above == other), "{room} looks up to {other}");
        }
        for source in sources(room) {
            assert_eq!(complaints(room, &source, allowed), Vec::<String>::new());
            assert!(source.starts_with("//! "), "{room} does not say what it owns");
        }
    }
}

#[test]
fn every_room_is_in_the_table() {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let rooms: BTreeSet<_> = lib
        .lines()
        .filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'))
        .collect();
    assert_eq!(rooms, HOUSE.iter().map(|(room, _)| *room).collect());
}

#[test]
fn a_wrong_import_is_noticed() {
    let source = "//! A session.\nuse crate::manager::SessionManager;\n/// See [`crate::executor`].\nuse crate::error::Error;\n";
    assert_eq!(complaints("session", source, &["error"]), ["session imports manager"]);
}

#[test]
fn the_core_names_no_framework_and_no_protocol_above_it() {
    for (room, _) in HOUSE.iter().filter(|(room, _)| !["axum", "actix_web"].contains(room)) {
        for source in sources(room) {
            for word in ["axum", "actix", "hyper", "http::"] {
                assert!(!code(&source).contains(word), "{room} names {word}");
            }
        }
    }
}
