//! Runs Python programs that a model wrote, and says whether they came to their end.
//!
//! Such a program may do anything, so a user has to ask for it ([`Sandbox::open`]), and it gets as
//! little as can be taken from it without being root and without unsafe code:
//!
//! | what | how |
//! | --- | --- |
//! | files | it writes in an empty folder of its own only (Landlock, Linux 5.13), at most 1 MiB a file |
//! | network, processes of others, their memory | namespaces of its own, where `unshare` may make them; TCP also by Landlock (Linux 6.7) |
//! | time | 3 s of computing, a minute in all, then its group of processes is killed |
//! | memory | 1 GiB of addresses |
//! | processes | none beside its own (of a user that is not root) |
//! | environment, input, output | none; the last words of an error are kept |
//!
//! It can read what its user can read, and outside Linux write where its user can and reach the
//! network: [`Sandbox::missing`] says what is not enforced. Who does not trust that runs the whole
//! evaluation in a container or virtual machine.

#[cfg(target_os = "linux")]
mod landlock;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::EvalError;

/// Seconds of computing: what the harness has for everything.
const SECONDS: u64 = 3;

/// Most time in all: on a machine that has much else to do, 3 s of computing take long.
const WALL: Duration = Duration::from_secs(60);

/// Bytes of addresses.
const MEMORY: u64 = 1 << 30;

/// Bytes of a file.
const FILE: u64 = 1 << 20;

/// Status of a program that came to its end. Not 0, with which one could leave before its tests.
const PASSED: i32 = 113;

const RUNNER: &str = include_str!("run.py");

/// What became of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It came to its end.
    Passed,
    /// It did not: its error, or how it was ended.
    Failed(String),
}

/// A place where programs may run.
#[derive(Debug)]
pub struct Sandbox {
    python: PathBuf,
    version: String,
    /// `unshare`, where it makes namespaces.
    unshare: Option<PathBuf>,
    landlock: bool,
}

impl Sandbox {
    /// Finds Python, and out what can be taken from a program here.
    ///
    /// # Errors
    /// [`EvalError::Python`]: there is none, or it does not run a program.
    pub fn open() -> Result<Self, EvalError> {
        let refuse = |cause: String| EvalError::Python { cause };
        if !cfg!(unix) {
            return Err(refuse("programs are run on Unix only".to_owned()));
        }
        // A name may stand for a script that chooses a version by the environment.
        let ask = ["-c", "import sys; print(sys.executable, *sys.version.split()[:1], sep='\\n')"];
        let found = Command::new("python3").args(ask).stdin(Stdio::null()).output();
        let found = found.map_err(|error| refuse(format!("cannot run python3: {error}")))?;
        let said = String::from_utf8_lossy(&found.stdout);
        let Some((python, version)) = said.trim().split_once('\n') else {
            return Err(refuse(format!("python3 ended with {}", found.status)));
        };
        let (python, version) = (python.into(), version.to_owned());
        let mut sandbox = Self { python, version, unshare: None, landlock: false };
        let on_path = std::env::var_os("PATH").unwrap_or_default();
        let unshare = std::env::split_paths(&on_path).map(|folder| folder.join("unshare"));
        sandbox.unshare = unshare.into_iter().find(|path| path.is_file());
        if sandbox.unshare.is_some() && sandbox.run("pass")? != Outcome::Passed {
            sandbox.unshare = None;
        }
        #[cfg(target_os = "linux")]
        {
            sandbox.landlock = landlock::is_enforced();
        }
        match sandbox.run("pass")? {
            Outcome::Passed => Ok(sandbox),
            Outcome::Failed(cause) => {
                let python = sandbox.python.display();
                Err(refuse(format!("{python} does not run an empty program: {cause}")))
            }
        }
    }

    /// The version of Python.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// What a program can do here that it should not.
    pub fn missing(&self) -> Vec<&'static str> {
        let mut all = Vec::new();
        if self.unshare.is_none() {
            all.push("reach the network (no unprivileged namespaces)");
        }
        if !self.landlock {
            all.push("write wherever you can (no Landlock)");
        }
        all
    }

    /// Runs a program.
    ///
    /// # Errors
    /// A system that cannot make a folder or start a process; never what the program does.
    pub fn run(&self, program: &str) -> Result<Outcome, EvalError> {
        let folder = tempfile::tempdir();
        let folder = folder.map_err(EvalError::io(&std::env::temp_dir(), "make a folder"))?;
        let (inside, file) = (folder.path().join("empty"), folder.path().join("program.py"));
        let errors = folder.path().join("stderr");
        fs::create_dir(&inside).map_err(EvalError::io(&inside, "create"))?;
        fs::write(&file, program).map_err(EvalError::io(&file, "write"))?;
        let ended = thread::scope(|scope| {
            // A thread of its own: what is taken from it is not given back.
            let run = scope.spawn(|| self.run_file(&file, &inside, &errors));
            run.join().unwrap_or_else(|_| Err(io::Error::other("the thread ended")))
        });
        let status = ended.map_err(EvalError::io(&self.python, "run"))?;
        let Some(status) = status else {
            return Ok(Outcome::Failed(format!("not done after {} s", WALL.as_secs())));
        };
        if status.code() == Some(PASSED) {
            return Ok(Outcome::Passed);
        }
        let mut said = Vec::new();
        let read = File::open(&errors).and_then(|file| file.take(1000).read_to_end(&mut said));
        let said = read.map(|_| String::from_utf8_lossy(&said).trim().to_owned());
        // What `unshare` says when its program is killed is of no use.
        let said = said.ok().filter(|said| !said.is_empty() && !said.starts_with("unshare:"));
        Ok(Outcome::Failed(said.unwrap_or_else(|| format!("ended with {status}"))))
    }

    /// The status of a program, `None` if it took too long.
    fn run_file(
        &self,
        file: &Path,
        inside: &Path,
        errors: &Path,
    ) -> io::Result<Option<ExitStatus>> {
        let (null, errors) =
            (File::options().write(true).open("/dev/null")?, File::create(errors)?);
        let mut command = match &self.unshare {
            None => Command::new(&self.python),
            Some(unshare) => {
                let mut command = Command::new(unshare);
                command.args(["--user", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--"]);
                command.arg(&self.python);
                command
            }
        };
        // No variables but one, so that a set has the same order in every run.
        command.env_clear().env("PYTHONHASHSEED", "0").current_dir(inside);
        command.stdin(File::open("/dev/null")?).stdout(null).stderr(errors);
        command.args(["-s", "-c", RUNNER]).arg(file);
        command.args([SECONDS, MEMORY, FILE].map(|limit| limit.to_string()));
        command.arg(PASSED.to_string());
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        #[cfg(target_os = "linux")]
        {
            if self.landlock {
                landlock::confine(inside).map_err(io::Error::other)?;
            }
        }
        wait(command.spawn()?)
    }
}

/// Waits for a process, then ends whatever it has begun.
fn wait(mut child: Child) -> io::Result<Option<ExitStatus>> {
    let begin = Instant::now();
    while !has_ended(&child)? {
        if begin.elapsed() > WALL {
            end_group(&child);
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(3));
    }
    // Its group has its number for as long as nobody has asked for its status.
    end_group(&child);
    child.wait().map(Some)
}

#[cfg(unix)]
fn pid(child: &Child) -> Option<rustix::process::Pid> {
    i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw)
}

#[cfg(unix)]
fn has_ended(child: &Child) -> io::Result<bool> {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let Some(pid) = pid(child) else { return Ok(true) };
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    Ok(waitid(WaitId::Pid(pid), look)?.is_some())
}

#[cfg(unix)]
fn end_group(child: &Child) {
    use rustix::process::{Signal, kill_process_group};
    if let Some(pid) = pid(child) {
        // Nobody is left to be ended, or they are.
        let _ended = kill_process_group(pid, Signal::KILL);
    }
}

#[cfg(not(unix))]
fn has_ended(_: &Child) -> io::Result<bool> {
    Ok(true)
}

#[cfg(not(unix))]
fn end_group(_: &Child) {}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sandbox, or a word that there is none.
    fn sandbox() -> Option<Sandbox> {
        let found = Sandbox::open();
        if let Err(error) = &found {
            eprintln!("skipped: {error}");
        }
        found.ok()
    }

    fn fails(sandbox: &Sandbox, program: &str) -> String {
        match sandbox.run(program).unwrap() {
            Outcome::Failed(how) => how,
            Outcome::Passed => panic!("passed: {program}"),
        }
    }

    #[test]
    fn only_a_program_that_comes_to_its_end_has_passed() {
        let Some(sandbox) = sandbox() else { return };
        assert_eq!(sandbox.run("assert 1 + 1 == 2\nprint('x' * 10**7)").unwrap(), Outcome::Passed);
        assert_eq!(fails(&sandbox, "assert 1 + 1 == 3, 'no'"), "AssertionError: no");
        assert!(fails(&sandbox, "def f(:").starts_with("SyntaxError"));
        assert_eq!(fails(&sandbox, "raise SystemExit(0)"), "SystemExit: 0");
        assert!(fails(&sandbox, "import os\nos._exit(0)").contains("0"));
        assert!(fails(&sandbox, "input()").starts_with("EOFError"));
    }

    #[test]
    fn time_memory_and_files_are_bounded() {
        let Some(sandbox) = sandbox() else { return };
        let how = fails(&sandbox, "while True: pass");
        assert!(how == "TimeoutError: 3 s of computing" || how.contains("not done"), "{how}");
        // Nor does it help not to listen.
        let stubborn = "import signal as s\ns.signal(s.SIGXCPU, s.SIG_IGN)\nwhile True: pass";
        let how = fails(&sandbox, stubborn);
        assert!(how.starts_with("ended with") || how.contains("not done"), "{how}");
        assert!(fails(&sandbox, "x = bytearray(2 << 30)").starts_with("MemoryError"));
        let how = fails(&sandbox, "open('a', 'wb').write(bytes(2 << 20))");
        assert!(how.starts_with("OSError"), "{how}");
        assert_eq!(sandbox.run("open('a', 'w').write('b')").unwrap(), Outcome::Passed);
    }

    #[test]
    fn nothing_is_inherited_and_nothing_is_left() {
        let Some(sandbox) = sandbox() else { return };
        let program = "import os\nassert set(os.environ) <= {'PYTHONHASHSEED', 'LC_CTYPE'}, os.environ\n\
            assert os.listdir() == []";
        assert_eq!(sandbox.run(program).unwrap(), Outcome::Passed);
        // What was begun beside it ends with it: the file that it would write never appears.
        let dir = tempfile::tempdir().unwrap();
        let late = dir.path().join("late");
        let program = format!(
            "import subprocess\nsubprocess.Popen(['sh', '-c', 'sleep 1; echo > {}'])",
            late.display()
        );
        sandbox.run(&program).unwrap();
        thread::sleep(Duration::from_millis(1500));
        assert!(!late.exists());
    }

    #[test]
    fn the_network_and_the_files_of_others_are_out_of_reach() {
        let Some(sandbox) = sandbox() else { return };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let program = format!(
            "import socket\nsocket.create_connection(('127.0.0.1', {}), 1)",
            address.port()
        );
        match sandbox.unshare.is_some() {
            true => assert!(fails(&sandbox, &program).contains("Error")),
            false => eprintln!("skipped: {:?}", sandbox.missing()),
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        match sandbox.landlock {
            true => {
                let how = fails(&sandbox, &format!("open({file:?}, 'w').write('b')"));
                assert!(how.starts_with("PermissionError"), "{how}");
                assert!(!file.exists());
            }
            false => eprintln!("skipped: {:?}", sandbox.missing()),
        }
    }
}
