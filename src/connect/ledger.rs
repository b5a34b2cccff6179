//! What the server owes: every frame that goes out and comes in, told apart by whose it is. No I/O.
//!
//! Each Sync or simple query that goes out is owed a ReadyForQuery, and the server answers in order. So the ledger knows
//! at every moment which request is being answered. Most requests are the driver's own affair, and are only counted. For
//! the others it does what the driver cannot: it puts the steps of a [`Flight`] under the Sync of the request that they
//! belong to, takes out the Syncs between requests that go together, keeps the answers to what is ours from the driver,
//! and gives it the ReadyForQuery it waits for. (PostgreSQL manual, chapter 54.2 "Message Flow".)

use std::io;

use bytes::BytesMut;

use super::incoming::Incoming;
use super::named::Named;
use super::outgoing::Outgoing;
use super::owed::Owed;
use super::wire::Wire;

/// Both directions of one connection, and what they have to tell each other.
#[derive(Debug)]
pub(super) struct Ledger {
    outgoing: Outgoing,
    incoming: Incoming,
    owed: Owed,
    named: Named,
}

impl Ledger {
    pub(super) fn new() -> Self {
        Self {
            outgoing: Outgoing::new(),
            incoming: Incoming::new(),
            owed: Owed::new(),
            named: Named::default(),
        }
    }

    /// What the driver is to get before anything else.
    pub(super) fn ready(&mut self) -> &mut BytesMut {
        &mut self.owed.ready
    }

    /// What is to be sent to the server before anything else.
    pub(super) fn reply(&mut self) -> &mut BytesMut {
        &mut self.incoming.reply
    }

    /// Whether what the driver writes must be [rewritten](Self::rewrite).
    #[inline]
    pub(super) fn rewrites(&self, wire: &Wire) -> bool {
        wire.has_next() || self.outgoing.is_in_group()
    }

    /// Counts what was written as it is.
    #[inline]
    pub(super) fn wrote(&mut self, bytes: &[u8], wire: &Wire) {
        self.outgoing.wrote(bytes, &mut self.owed, wire);
    }

    /// Turns what the driver writes into what the server is to get. All of `bytes` is taken.
    pub(super) fn rewrite(&mut self, bytes: &[u8], out: &mut BytesMut, wire: &Wire) -> io::Result<()> {
        self.outgoing.rewrite(bytes, out, &mut self.owed, &mut self.named, wire)
    }

    /// So many bytes of what was [rewritten](Self::rewrite) were handed to the socket.
    pub(super) fn rewritten_sent(&mut self, bytes: usize, wire: &Wire) {
        self.outgoing.rewritten_sent(bytes, wire);
    }

    /// Reads what came, and moves what is the driver's to the front, where there is so much of it then. What else is the
    /// driver's is [ready](Self::ready), and comes behind.
    #[inline]
    pub(super) fn read(&mut self, bytes: &mut [u8], wire: &Wire) -> usize {
        self.incoming.read(bytes, &mut self.owed, &mut self.named, wire)
    }
}

#[cfg(test)]
mod tests {
    use super::super::exchange::READY;
    use super::super::faults::Fault;
    use super::super::flight::{Kind, Step};
    use super::super::frames::tests::{frame, tags};
    use super::super::outgoing::{FLUSH, SYNC};
    use super::super::wire::{Begin, TransactionStatus};
    use super::*;

    /// A ledger past start-up, and its wire.
    fn started() -> (Ledger, Wire) {
        let (mut ledger, wire) = (Ledger::new(), Wire::default());
        ledger.wrote(&[0, 0, 0, 8, 0, 3, 0, 0], &wire);
        let mut hello =
            [frame(b'R', &[0; 4]), frame(b'K', &[0, 0, 0, 7, 0, 0, 0, 9]), frame(b'Z', b"I")].concat();
        assert_eq!(ledger.read(&mut hello, &wire), hello.len());
        assert_eq!((wire.process_id(), wire.secret_key()), (7, 9));
        (ledger, wire)
    }

    /// What the driver sends for a statement.
    fn request() -> Vec<u8> {
        [frame(b'B', b"\0s1\0\0\0\0\0\0\0"), frame(b'E', b"\0\0\0\0\0"), frame(b'S', b"")].concat()
    }

    fn close() -> Vec<u8> {
        [frame(b'C', b"Ss2\0"), frame(b'S', b"")].concat()
    }

    fn answer(tag: &[u8]) -> Vec<u8> {
        [frame(b'2', b""), frame(b'D', &[b'Z'; 30]), frame(b'C', tag)].concat()
    }

    /// The answer to a statement without rows, as to one of ours.
    fn done(tag: &[u8]) -> Vec<u8> {
        [frame(b'1', b""), frame(b'2', b""), frame(b'C', tag)].concat()
    }

    /// Writes what the driver sends, in pieces; gives what the server gets.
    fn write(ledger: &mut Ledger, wire: &Wire, bytes: &[u8], step: usize) -> Vec<u8> {
        let mut got = Vec::new();
        for chunk in bytes.chunks(step) {
            if ledger.rewrites(wire) {
                let mut out = BytesMut::new();
                ledger.rewrite(chunk, &mut out, wire).expect("of the kind that waits");
                ledger.rewritten_sent(out.len(), wire);
                got.extend(out);
            } else {
                ledger.wrote(chunk, wire);
                got.extend(chunk);
            }
        }
        got
    }

    /// Reads what the server sends, in pieces; gives what the driver gets.
    fn read(ledger: &mut Ledger, wire: &Wire, bytes: &[u8], step: usize) -> Vec<u8> {
        let mut got = Vec::new();
        for chunk in bytes.chunks(step) {
            let mut chunk = chunk.to_vec();
            let kept = ledger.read(&mut chunk, wire);
            got.extend(&chunk[..kept]);
            got.extend(ledger.ready().split());
        }
        got
    }

    /// Every way to cut so many bytes into pieces of one size.
    fn steps(length: usize) -> impl Iterator<Item = usize> {
        (1..40).chain([length.max(1)])
    }

    #[test]
    fn a_transaction_is_read_alike_in_pieces_of_any_size() {
        let served = [
            done(b"BEGIN\0"),
            frame(b'N', b"notice"),
            answer(b"UPDATE 1\0"),
            frame(b'Z', b"T"),
            frame(b'E', b"SFEHLER\0VERROR\0C23505\0Ma\0nkey\0\0"),
            frame(b'Z', b"E"),
            frame(b'S', b"a\0b\0"),
        ]
        .concat();
        let passed = [
            frame(b'N', b"notice"),
            answer(b"UPDATE 1\0"),
            frame(b'Z', b"T"),
            frame(b'E', b"SFEHLER\0VERROR\0C23505\0Ma\0nkey\0\0"),
            frame(b'Z', b"E"),
            frame(b'S', b"a\0b\0"),
        ]
        .concat();
        for out in [1, 3, 7, 1000] {
            for step in steps(served.len()) {
                let (mut ledger, wire) = started();
                wire.record();
                wire.lead(Step::Begin("BEGIN".into()));
                let sent = write(&mut ledger, &wire, &[request(), request()].concat(), out);
                let syncs = sent.windows(5).filter(|window| *window == SYNC).count();
                assert_eq!((syncs, wire.sent()), (2, 2), "pieces of {out}");
                assert_eq!(wire.begin(), Begin::UnderWay);
                assert_eq!(read(&mut ledger, &wire, &served, step), passed, "pieces of {step}");
                assert_eq!((wire.answered(), wire.begin()), (2, Begin::Confirmed), "pieces of {step}");
                assert_eq!(wire.status(), TransactionStatus::Failed);
                let Some(Fault::Server(first)) = wire.fault(0) else { panic!("pieces of {step}") };
                assert_eq!((first.code().code(), first.constraint()), ("23505", Some("key")));
            }
        }
    }

    #[test]
    fn a_begin_that_fails_is_the_answer_to_its_statement() {
        let error = [frame(b'E', b"VERROR\0C57014\0Ma\0\0"), frame(b'Z', b"I")].concat();
        for step in steps(error.len()) {
            let (mut ledger, wire) = started();
            wire.record();
            wire.lead(Step::Begin("BEGIN".into()));
            write(&mut ledger, &wire, &request(), 1000);
            assert_eq!(read(&mut ledger, &wire, &error, step), error);
            assert_eq!((wire.begin(), wire.answered()), (Begin::Over, 1));
            assert!(!wire.is_ended_by_sql());
        }
    }

    #[test]
    fn what_ends_a_transaction_is_sent_in_place_of_an_empty_query() {
        let query = frame(b'Q', b"\0");
        let steps_done = [done(b"ROLLBACK\0"), done(b"RELEASE\0")].concat();
        let refusal = [frame(b'E', b"VERROR\0C23503\0Ma\0\0"), frame(b'Z', b"I")].concat();
        let refused = [&steps_done[..], &refusal].concat();
        let committed = [&steps_done[..], &done(b"COMMIT\0"), &frame(b'Z', b"I")].concat();
        for (served, passed) in [(&refused, refusal), (&committed, frame(b'Z', b"I"))] {
            for out in [1, 3, 1000] {
                for step in steps(served.len()) {
                    let (mut ledger, wire) = started();
                    wire.record();
                    wire.happen(super::super::wire::happened::BEGUN);
                    wire.lead(Step::RollBackTo(3));
                    wire.lead(Step::Release(3));
                    wire.end(Step::Commit);
                    let sent = write(&mut ledger, &wire, &query, out);
                    assert_eq!(tags(&sent), b"PBEPBEPBES", "pieces of {out}");
                    assert!(wire.facts().commit_sent && wire.sent() == 1);
                    assert_eq!(read(&mut ledger, &wire, served, step), passed, "pieces of {step}");
                    assert_eq!(wire.answered(), 1);
                    assert_eq!(wire.is_committed(), served == &committed);
                    assert!(!wire.is_ended_by_sql());
                }
            }
        }
    }

    /// Two statements and COMMIT under one Sync, with a Close that the driver sends between the two.
    fn group(out: usize) -> (Ledger, Wire) {
        let (mut ledger, wire) = started();
        wire.record();
        wire.lead(Step::Begin("BEGIN".into()));
        wire.group(2, true);
        let sent = write(&mut ledger, &wire, &[request(), close(), request()].concat(), out);
        // BEGIN; the two; COMMIT; and only then what nobody waits for.
        assert_eq!(tags(&sent), b"CPBEBEBEPBESCS", "pieces of {out}");
        assert!(wire.facts().commit_sent);
        (ledger, wire)
    }

    #[test]
    fn a_group_has_one_sync_and_the_driver_its_answers() {
        let served = [
            done(b"BEGIN\0"),
            answer(b"UPDATE 1\0"),
            answer(b"UPDATE 2\0"),
            done(b"COMMIT\0"),
            frame(b'Z', b"I"),
            frame(b'3', b""),
            frame(b'Z', b"I"),
        ]
        .concat();
        // The first, the Close, and the second as soon as the commit is certain.
        let passed =
            [answer(b"UPDATE 1\0"), READY.to_vec(), READY.to_vec(), answer(b"UPDATE 2\0"), READY.to_vec()]
                .concat();
        for out in [1, 4, 1000] {
            for step in steps(served.len()) {
                let (mut ledger, wire) = group(out);
                assert_eq!(read(&mut ledger, &wire, &served, step), passed, "pieces of {step}");
                assert!(
                    wire.is_committed() && wire.answered() == 2 && wire.status() == TransactionStatus::Idle
                );
                // And the next is read as ever.
                write(&mut ledger, &wire, &request(), 1000);
                let next = [answer(b"SELECT 1\0"), frame(b'Z', b"I")].concat();
                assert_eq!(read(&mut ledger, &wire, &next, step), next);
                assert_eq!(wire.answered(), 3);
            }
        }
    }

    #[test]
    fn what_is_read_over_after_an_error_is_answered_all_the_same() {
        let error = frame(b'E', b"VERROR\0C23505\0Ma\0\0");
        let served = [
            done(b"BEGIN\0"),
            frame(b'2', b""),
            error.clone(),
            frame(b'Z', b"E"),
            frame(b'3', b""),
            frame(b'Z', b"E"),
        ]
        .concat();
        for step in steps(served.len()) {
            let (mut ledger, wire) = group(1000);
            let got = read(&mut ledger, &wire, &served, step);
            assert_eq!(
                tags(&got),
                b"2EZZZ",
                "the first with its error, the Close, the second; pieces of {step}"
            );
            assert!(!wire.is_committed() && wire.answered() == 2);
        }
    }

    #[test]
    fn a_copy_that_nobody_sends_data_for_is_ended() {
        let served = [frame(b'2', b""), frame(b'G', b"\0\0\0")].concat();
        let error = [frame(b'E', b"VERROR\0C57014\0Ma\0\0"), frame(b'Z', b"I")].concat();
        for step in steps(served.len()) {
            let (mut ledger, wire) = started();
            write(&mut ledger, &wire, &request(), 1000);
            assert_eq!(read(&mut ledger, &wire, &served, step), frame(b'2', b""), "pieces of {step}");
            let reply = ledger.reply().split();
            assert!(reply.starts_with(b"f") && reply.ends_with(SYNC));
            assert_eq!(read(&mut ledger, &wire, &error, step), error);
        }
    }

    #[test]
    fn a_copy_out_that_nobody_reads_is_an_error_and_its_data_nobodys() {
        let served = [
            frame(b'2', b""),
            frame(b'H', b"\0\0\0"),
            frame(b'd', &[b'x'; 50]),
            frame(b'c', b""),
            frame(b'C', b"COPY 1\0"),
            frame(b'Z', b"I"),
        ]
        .concat();
        for step in steps(served.len()) {
            let (mut ledger, wire) = started();
            write(&mut ledger, &wire, &request(), 1000);
            let got = read(&mut ledger, &wire, &served, step);
            assert_eq!(tags(&got), b"2EZ", "pieces of {step}");
        }
    }

    #[test]
    fn a_copy_in_is_answered_once_though_the_driver_asks_twice() {
        let (mut ledger, wire) = started();
        wire.expect(Kind::CopyIn);
        let sent = write(&mut ledger, &wire, &request(), 3);
        assert!(sent.ends_with(FLUSH) && wire.sent() == 0);
        write(&mut ledger, &wire, &[frame(b'f', b"\0"), frame(b'S', b"")].concat(), 4);
        assert_eq!(wire.sent(), 1);
        let refused = [frame(b'E', b"VERROR\0C42P01\0Ma\0\0"), frame(b'Z', b"I")].concat();
        assert_eq!(read(&mut ledger, &wire, &refused, 3), refused);
        assert_eq!(wire.answered(), 1);
    }
}
