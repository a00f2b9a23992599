//! Where the files of a checkpoint lie: in a folder, or wherever the host has them.
//!
//! A checkpoint is a handful of files under names. [`Files`] is such a set without a folder: memory
//! ([`MemoryFiles`]), or whatever a program makes of it. The bytes are those that a folder's files
//! have.
//!
//! NOTE: a host's files are written from their first byte to their last, so that they may be a
//! socket or an archive. The checksums stand in front of the tensors that they are of; where
//! nothing can be written over, tensors are read twice for them, and where it can, once.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::folder::{self, attempt};
use super::{FILES, not_a_file};
use crate::signals::file_limit_is_an_error;
use crate::{Error, Result};

/// A set of named files that a checkpoint is loaded from and saved to, in place of a folder.
///
/// Names are plain, such as `model.safetensors`; the set may hold others, which stay. A load opens
/// files and reads them in pieces, at offsets that grow but for the first pieces of each.
pub trait Files {
    /// Opens a file for reading; None where there is none of this name.
    ///
    /// # Errors
    /// Whatever keeps a file that is there from being read, which becomes an [`Error::Io`].
    fn open(&self, name: &str) -> io::Result<Option<Box<dyn FileRead + '_>>>;

    /// Begins a save. Until [`FileSave::commit`] returns, and where it is dropped before, the files
    /// are what they were.
    ///
    /// # Errors
    /// Whatever keeps it from being begun.
    fn save(&mut self) -> io::Result<Box<dyn FileSave + '_>>;
}

/// A file that is open for reading, and stays what it was when it was opened.
pub trait FileRead {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Fills `to` with the bytes from `offset` on, all of which lie in the file.
    ///
    /// # Errors
    /// Whatever keeps them from being read.
    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()>;
}

/// A save under way, which writes one file behind the other. Dropped without a commit, it is given
/// up, and the files are what they were.
pub trait FileSave {
    /// Begins a file of `size` bytes, all of which are going to be written unless the save fails.
    ///
    /// # Errors
    /// Whatever keeps it from being made.
    fn create(&mut self, name: &str, size: u64) -> io::Result<()>;

    /// Appends bytes to the file that was begun last.
    ///
    /// # Errors
    /// Whatever keeps them from being written.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Whether there is [`FileSave::write_over`]. Tensors are made once then, and else twice.
    fn can_write_over(&self) -> bool {
        false
    }

    /// Writes over the first bytes of the file that was begun last, all of which are there. Only
    /// called where it can be done.
    ///
    /// # Errors
    /// Whatever keeps them from being written.
    fn write_over(&mut self, _bytes: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Ends the file, all of which is written.
    ///
    /// # Errors
    /// Whatever shows only now.
    fn close(&mut self) -> io::Result<()>;

    /// Puts the files of this save in the place of those of the one before, all at once. Where it is
    /// one of a checkpoint, those of [`MemoryFiles::CHECKPOINT`] that were not written are removed;
    /// adapters are files of their own.
    ///
    /// # Errors
    /// Whatever keeps it from being done; the files are what they were.
    fn commit(self: Box<Self>) -> io::Result<()>;
}

/// Where a checkpoint is saved to.
pub(crate) enum Place<'a> {
    Folder(&'a Path),
    Files(&'a mut dyn Files),
}

impl Place<'_> {
    /// Replaces files by those that `write` writes, all at once or none; of a folder those are `owned`,
    /// as [`folder::replace`] has it.
    ///
    /// # Errors
    /// As [`folder::replace`]; [`Error::Io`] of files that lie elsewhere.
    pub(super) fn replace(
        self,
        owned: &[&str],
        mark: &str,
        write: impl Fn(&mut NewFiles<'_>) -> Result<()>,
    ) -> Result<()> {
        let of_set = |action| Error::io(action, Path::new("the host's files"));
        match self {
            // NOTE: of a host's own files, a signal that it asked for is the host's.
            Self::Folder(dir) => file_limit_is_an_error(|| {
                folder::replace(dir, owned, mark, |new| write(&mut NewFiles::Folder(new)))
            }),
            Self::Files(files) => {
                let mut new = NewFiles::Host(files.save().map_err(of_set("begin a save in"))?);
                write(&mut new)?;
                let NewFiles::Host(save) = new else { return Ok(()) };
                save.commit().map_err(of_set("commit a save in"))
            }
        }
    }
}

/// Files in memory, by name.
#[derive(Clone, Default)]
pub struct MemoryFiles(BTreeMap<String, Bytes>);

#[derive(Clone)]
enum Bytes {
    Own(Vec<u8>),
    Lent(Arc<dyn AsRef<[u8]> + Send + Sync>),
}

impl Bytes {
    fn get(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Lent(bytes) => (**bytes).as_ref(),
        }
    }
}

impl MemoryFiles {
    /// The files that a checkpoint is saved as; the last two only that of a trainer.
    pub const CHECKPOINT: [&'static str; 4] = FILES;

    /// No files.
    pub fn new() -> Self {
        Self::default()
    }

    /// The names of all files, in their order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The bytes of a file.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.get(name).map(Bytes::get)
    }

    /// Puts a file, in place of one of the same name.
    pub fn put(&mut self, name: impl Into<String>, bytes: Vec<u8>) {
        self.0.insert(name.into(), Bytes::Own(bytes));
    }

    /// Puts a file whose bytes lie elsewhere, such as a map of one on the disk: they are not
    /// copied, and let go of with the file.
    pub fn lend(&mut self, name: impl Into<String>, bytes: Arc<dyn AsRef<[u8]> + Send + Sync>) {
        self.0.insert(name.into(), Bytes::Lent(bytes));
    }

    /// Removes a file; false where there is none of this name.
    pub fn remove(&mut self, name: &str) -> bool {
        self.0.remove(name).is_some()
    }
}

impl std::fmt::Debug for MemoryFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sizes = self.0.iter().map(|(name, bytes)| (name, bytes.get().len()));
        f.debug_map().entries(sizes).finish()
    }
}

impl Files for MemoryFiles {
    fn open(&self, name: &str) -> io::Result<Option<Box<dyn FileRead + '_>>> {
        Ok(self.get(name).map(|bytes| Box::new(bytes) as Box<dyn FileRead + '_>))
    }

    fn save(&mut self) -> io::Result<Box<dyn FileSave + '_>> {
        Ok(Box::new(MemorySave { files: &mut self.0, new: Vec::new() }))
    }
}

impl FileRead for &[u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|at| self.get(at..));
        let bytes = from.and_then(|from| from.get(..to.len()));
        to.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Files that are not yet those of a [`MemoryFiles`].
struct MemorySave<'a> {
    files: &'a mut BTreeMap<String, Bytes>,
    new: Vec<(String, Vec<u8>)>,
}

impl FileSave for MemorySave<'_> {
    fn create(&mut self, name: &str, size: u64) -> io::Result<()> {
        let mut bytes = Vec::new();
        let size = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        reserve(&mut bytes, size)?;
        self.new.push((name.to_owned(), bytes));
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let (_, file) = self.new.last_mut().ok_or(io::ErrorKind::InvalidInput)?;
        // There is room for as much as was announced.
        reserve(file, bytes.len())?;
        file.extend_from_slice(bytes);
        Ok(())
    }

    fn can_write_over(&self) -> bool {
        true
    }

    fn write_over(&mut self, bytes: &[u8]) -> io::Result<()> {
        let file = self.new.last_mut().and_then(|(_, file)| file.get_mut(..bytes.len()));
        file.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(bytes);
        Ok(())
    }

    fn close(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn commit(self: Box<Self>) -> io::Result<()> {
        // Of a checkpoint before, nothing stays beside one; adapters are none.
        if self.new.iter().any(|(name, _)| FILES.contains(&name.as_str())) {
            self.files.retain(|name, _| !FILES.contains(&name.as_str()));
        }
        self.files.extend(self.new.into_iter().map(|(name, bytes)| (name, Bytes::Own(bytes))));
        Ok(())
    }
}

fn reserve(bytes: &mut Vec<u8>, more: usize) -> io::Result<()> {
    let len = bytes.len() + more;
    crate::reserve::reserve(bytes, "a file in memory", len)
        .map_err(|error| io::Error::new(io::ErrorKind::OutOfMemory, error.to_string()))
}

/// A file of a checkpoint that is open for reading.
pub(super) enum OpenFile<'a> {
    /// Of a folder.
    Disk(File),
    Host(Box<dyn FileRead + 'a>),
}

impl OpenFile<'_> {
    /// Its size in bytes; messages call it `path`.
    pub(super) fn size(&self, path: &Path) -> Result<u64> {
        match self {
            Self::Disk(file) => Ok(file.metadata().map_err(Error::io("open", path))?.len()),
            Self::Host(file) => Ok(file.size()),
        }
    }

    /// An error for what has a file's name and is something else.
    pub(super) fn check_is_file(&self, path: &Path) -> Result<()> {
        let Self::Disk(file) = self else { return Ok(()) };
        let kind = file.metadata().map_err(Error::io("open", path))?.file_type();
        if kind.is_file() { Ok(()) } else { Err(Error::format(path, not_a_file(kind))) }
    }

    /// Fills `out` with the bytes from `offset` on; the position of a shared file stays.
    pub(super) fn read_exact_at(&self, path: &Path, out: &mut [u8], offset: u64) -> Result<()> {
        let read = match self {
            Self::Disk(file) => file.read_exact_at(out, offset),
            Self::Host(file) => file.read_at(offset, out),
        };
        read.map_err(|e| {
            let what = match e.kind() {
                io::ErrorKind::UnexpectedEof => {
                    "it ends before, and was longer when it was opened".into()
                }
                _ => e.to_string(),
            };
            let message = format!("expected {} bytes from byte {offset} on: {what}", out.len());
            Error::io("read", path)(io::Error::new(e.kind(), message))
        })
    }
}

/// Where the files of a save are made.
pub(super) enum NewFiles<'a> {
    Folder(&'a Path),
    Host(Box<dyn FileSave + 'a>),
}

impl NewFiles<'_> {
    /// What messages call a file.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Folder(dir) => dir.join(name),
            Self::Host(_) => name.into(),
        }
    }

    /// Whether what is written stays as it is.
    pub(super) fn are_in_order(&self) -> bool {
        matches!(self, Self::Host(save) if !save.can_write_over())
    }

    /// Begins a file of `size` bytes.
    pub(super) fn create(&mut self, name: &str, size: u64) -> Result<NewFile<'_>> {
        let path = self.path(name);
        Ok(match self {
            Self::Folder(_) => {
                let file = attempt(|| File::create_new(&path)).map_err(Error::io("create", &path));
                NewFile::Disk(BufWriter::with_capacity(1 << 16, file?), path)
            }
            Self::Host(save) => {
                save.create(name, size).map_err(Error::io("create", &path))?;
                NewFile::Host(&mut **save, path)
            }
        })
    }

    /// Makes a small file.
    pub(super) fn put(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = self.create(name, bytes.len() as u64)?;
        file.write(bytes)?;
        file.close()
    }
}

/// A file that is written, and what messages call it.
pub(super) enum NewFile<'a> {
    Disk(BufWriter<File>, PathBuf),
    Host(&'a mut dyn FileSave, PathBuf),
}

impl NewFile<'_> {
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Disk(out, path) => {
                attempt(|| out.write_all(bytes)).map_err(Error::io("write", path))
            }
            Self::Host(save, path) => save.write(bytes).map_err(Error::io("write", path)),
        }
    }

    /// Writes over the beginning of a file that is not in order.
    pub(super) fn write_over(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Disk(out, path) => {
                let io = |e| Error::io("write", path)(e);
                attempt(|| out.seek(SeekFrom::Start(0))).map_err(io)?;
                attempt(|| out.write_all(bytes)).map_err(io)
            }
            Self::Host(save, path) if save.can_write_over() => {
                save.write_over(bytes).map_err(Error::io("write", path))
            }
            Self::Host(_, path) => {
                let message = "the tensors changed while they were saved; save them again when \
                               nothing changes them";
                Err(Error::format(path, message))
            }
        }
    }

    /// Ends the file; one on a disk is there to stay.
    pub(super) fn close(self) -> Result<()> {
        match self {
            Self::Disk(mut out, path) => {
                attempt(|| out.flush()).map_err(Error::io("write", &path))?;
                attempt(|| out.get_ref().sync_all()).map_err(Error::io("flush", &path))
            }
            Self::Host(save, path) => save.close().map_err(Error::io("close", &path)),
        }
    }
}
